"""Log of a real run of two rounds, as ``flwr log --stream`` of Flower 1.42 with Ray 2.55 wrote it.

Paths and the middle of Flower's summary are shortened.
"""

INFO, WARNING, ERROR = (
    "\x1b[92mINFO \x1b[0m:      ",
    "\x1b[93mWARNING \x1b[0m:   ",
    "\x1b[91mERROR ",
)
ERROR += "\x1b[0m:     "
RESULTS = [
    "folder   /results/la-lora-20261126-201603-799913",
    "quality  accuracy 0.9316  balanced accuracy 0.6750",
    "privacy  largest client epsilon 3.00 at delta 1e-05  (NOT private, see privacy.json)",
    "bytes    150,536 up, 165,282 down, per client and round",
]
ROUNDS = [
    "round 0/2  start  accuracy 0.3860  balanced accuracy 0.6127  epsilon <= 0.00",
    "round 1/2  phase B  aggregated  accuracy 0.9035  balanced accuracy 0.5490  epsilon <= 2.10"
    "  18.5 s  ETA 0:21",
    "round 2/2  phase A  aggregated  accuracy 0.9316  balanced accuracy 0.6750  epsilon <= 3.00"
    "  19.3 s  ETA 0:00",
]
NOTES = [
    "loading model demo:all-MiniLM-L6-v2 and data demo:sms-spam",
    "model with 12 target layers, 74498 trainable parameters",
    "la-lora-20261126-201603-799913: la-lora, 4 clients, 4 steps of 64 expected examples, "
    "epsilon 3.0, delta 1e-05",
]
WARNINGS = [
    'privacy.noise="seeded": this run is repeatable and NOT private',
    "158 of 570 test texts fill model.max-length=32 tokens: longer ones are truncated",
]
LOG = f"""\
Using SuperLink: local (127.0.0.1:42169)
{INFO}Starting logstream for run_id `7039449314589657661`
{INFO}Starting Flower Simulation
{WARNING}Since flwr 1.32, default simulated SuperNodes changed from 10 to 2.
{INFO}Federation `@none/default` (4 simulated SuperNodes)
{INFO}To change federation size, use the following command:
{INFO}\tflwr federation simulation-config @none/default <superlink> --num-supernodes <N>
Successfully installed lalora-app to /tmp/lalora-4d56cvxm/apps/lalora.lalora-app.0.1.0.544cd74b.
{WARNING}LaLoRA {WARNINGS[0]}
{INFO}LaLoRA {NOTES[0]}
{WARNING}LaLoRA {WARNINGS[1]}
{INFO}LaLoRA {NOTES[1]}
/site-packages/ray/_private/worker.py:2051: FutureWarning: Tip: In future versions of Ray, Ray \
will no longer override accelerator visible devices env var if num_gpus=0 or num_gpus=None
  warnings.warn(
{INFO}Starting FederatedLora strategy:
{INFO}\t├── Number of rounds: 2
{INFO}\t├── ArrayRecord (0.29 MB)
{INFO}\t├── ConfigRecord (train): (empty!)
{INFO}\t├── ConfigRecord (evaluate): (empty!)
{INFO}LaLoRA {NOTES[2]}
{INFO}
{INFO}LaLoRA {ROUNDS[0]}
{INFO}Initial global evaluation results: {{'accuracy': 0.385964, 'balanced_accuracy': 0.612745}}
{INFO}
{INFO}[ROUND 1/2]
{INFO}Global evaluation
{INFO}LaLoRA {ROUNDS[1]}
{INFO}\t└──> MetricRecord: {{'accuracy': 0.903508, 'balanced_accuracy': 0.549019}}
{INFO}
{INFO}[ROUND 2/2]
{INFO}Global evaluation
{INFO}LaLoRA {ROUNDS[2]}
{INFO}\t└──> MetricRecord: {{'accuracy': 0.931578, 'balanced_accuracy': 0.675}}
{INFO}
{INFO}Strategy execution finished in 275.27s
{INFO}
{INFO}Final results:
{INFO}
{INFO}\tGlobal Arrays:
{INFO}\t\tArrayRecord (0.287 MB)
{INFO}\t
{INFO}\tServerApp-side Evaluate Metrics:
{INFO}\t{{ 0: {{'accuracy': '3.8596e-01', 'balanced_accuracy': '6.1275e-01'}},
{INFO}\t  1: {{'accuracy': '9.0351e-01', 'balanced_accuracy': '5.4902e-01'}}}}
{INFO}
{INFO}LaLoRA result  {RESULTS[0]}
{INFO}LaLoRA result  {RESULTS[1]}
{INFO}LaLoRA result  {RESULTS[2]}
{INFO}LaLoRA result  {RESULTS[3]}
{INFO}
"""
