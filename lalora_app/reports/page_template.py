"""The jinja2 template of a report page. All values are escaped except the SVG figures."""

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root {
  --page: #f3f5f8; --card: #ffffff; --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  --accent: #0b62a8; --tint: #eef5fb; --warn: #8c1d18; --warn-page: #fdecea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b212a; --ink: #e6eaf0; --soft: #a2adbb; --line: #323b48;
    --accent: #79b8f3; --tint: #202b38; --warn: #ffb4ab; --warn-page: #3b1a18;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 var(--sans);
}
main { max-width: 1200px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 0 0 .2rem; }
p { margin: 0 0 .75rem; max-width: 90ch; overflow-wrap: anywhere; }
.below { margin-top: .6rem; }
.soft { color: var(--soft); font-size: .9rem; }
.warn {
  background: var(--warn-page); color: var(--warn); border-left: 5px solid currentColor;
  border-radius: 6px; padding: .7rem 1rem; margin: 0 0 .75rem; max-width: none;
}
.tiles {
  display: grid; gap: .8rem; margin: 1.5rem 0 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 11rem), 1fr));
}
.tile, .card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; min-width: 0;
}
.tile { padding: .8rem 1rem; display: flex; flex-direction: column; }
.tile b { font-size: 1.35rem; line-height: 1.3; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .55rem; text-align: right; vertical-align: bottom; }
td { white-space: nowrap; font-size: .95rem; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
th { border-bottom: 2px solid var(--line); }
td { border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
tr.first td { border-top: 2px solid var(--line); }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
td.best { font-weight: 700; color: var(--accent); background: var(--tint); }
.tag {
  font-size: .72rem; font-weight: 700; padding: .1rem .4rem; margin-right: .5rem;
  border-radius: 4px; color: var(--warn); background: var(--warn-page);
}
.charts {
  display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr));
}
.charts .card { padding: 1rem; }
.charts .wide { grid-column: 1 / -1; }
.panels { display: flex; flex-wrap: wrap; gap: .8rem; justify-content: space-evenly; }
.panel {
  flex: 1 1 20rem; max-width: 28rem; min-width: 0; padding: .5rem;
  background: #ffffff; border-radius: 6px;
}
.panel svg { display: block; width: 100%; height: auto; }
.panel svg text, .panel svg tspan { font-family: var(--sans) !important; }
details { padding: .8rem 1rem; }
details + details { margin-top: .8rem; }
summary { cursor: pointer; font-weight: 600; }
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr));
  gap: 0 2rem; margin: .8rem 0 0; font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace;
}
dl div {
  display: flex; justify-content: space-between; gap: 1rem; padding: .2rem 0;
  border-bottom: 1px solid var(--line);
}
dt { color: var(--soft); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
details .scroll { margin-top: .8rem; font-size: .85rem; }
@media print { body { background: #ffffff; } .card, .tile { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% for warning in warnings %}
<p class="warn"><strong>NOT private.</strong> {{ warning }}</p>
{% endfor %}
<p>{{ subject }}</p>
{% for sentence in privacy %}
<p>{{ sentence }}</p>
{% endfor %}

<div class="tiles">
{% for tile in tiles %}
<div class="tile"><span class="soft">{{ tile.title }}</span><b>{{ tile.value }}</b>
<span class="soft">{{ tile.detail }}</span></div>
{% endfor %}
</div>

<h2>Results</h2>
<div class="card scroll">
<table>
<thead><tr>{% for name in titles %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for line in lines %}
<tr{% if line.first %} class="first"{% endif %}>
{%- for cell in line.cells -%}
<td{% if cell.best %} class="best"{% endif %}>
{%- if loop.index == 2 and not line.private %}<span class="tag">NOT private</span>{% endif -%}
{{ cell.text }}</td>
{%- endfor -%}
</tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="soft below">{{ legend }}</p>
{% for note in notes %}
<p class="soft">{{ note }}</p>
{% endfor %}
{% if paired %}

<h2>Differences</h2>
<div class="card scroll">
<table>
<thead><tr>{% for name in paired.titles %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for line in paired.cells %}
<tr>{% for cell in line %}<td>{{ cell.text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="soft below">{{ paired_note }}</p>
{% endif %}

<h2>Figures</h2>
{% if bands %}
<p class="soft">Lines are means over seeds, bands reach from the lowest to the highest seed.</p>
{% endif %}
<div class="charts">
{% for chart in charts if chart.panels %}
<section class="card{% if chart.panels | length > 1 %} wide{% endif %}">
<h3>{{ chart.title }}</h3>
<p class="soft">{{ chart.note }}</p>
<div class="panels">
{% for panel in chart.panels %}
<div class="panel">{{ panel | safe }}</div>
{% endfor %}
</div>
</section>
{% endfor %}
</div>
{% for chart in charts if not chart.panels %}
<p class="soft below"><strong>{{ chart.title }}:</strong> {{ chart.note }}</p>
{% endfor %}

<h2>Settings</h2>
<details class="card">
<summary>{{ "Common to all runs" if own else "All settings" }}</summary>
<dl>
{% for key, value in common %}
<div><dt>{{ key }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
</details>
{% if own %}
<details class="card" open>
<summary>Where they differ</summary>
<div class="scroll">
<table>
<thead>
<tr><th>method</th><th>ε promised</th>{% for key in keys %}<th>{{ key }}</th>{% endfor %}</tr>
</thead>
<tbody>
{% for line in own %}
<tr>{% for value in line %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</details>
{% endif %}
</main>
</body>
</html>
"""
