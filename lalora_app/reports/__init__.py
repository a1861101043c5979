"""HTML reports, tables and charts of finished runs.

In: the records of finished runs (`results.finished_run.Record`). Out: one HTML page with tables and
charts, or the table alone as text, Markdown, CSV or LaTeX.
"""
