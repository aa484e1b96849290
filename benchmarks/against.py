"""This checkout beside another one, such as the commit before a change, in one run.

    git worktree add ../before HEAD~1
    python -m benchmarks.against ../before

WRITE at test time, a training step, the import of the package and the help of the command line, each in processes that
take turns between the two checkouts. Figures are processor seconds on one thread: the median of this checkout, and the
median and quartiles of the ratios of neighbouring runs. They go to `benchmarks/results/against.md`.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "results" / "against.md"

_MODEL = """
import time, torch
from transformers import LlamaConfig, LlamaForCausalLM
from hf_gradmem import GradMemConfig, get_gradmem_model
torch.manual_seed(0)
torch.set_num_threads(1)

def build(width, layers, vocabulary, **options):
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width,
                         num_hidden_layers=layers, num_attention_heads=width // 32, num_key_value_heads=width // 32)
    return get_gradmem_model(LlamaForCausalLM(config), GradMemConfig(write_steps=2, **options))

def report(step, repeats):
    step()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    print(sorted(times)[repeats // 2])
"""

# What is run in a process of its own; it prints processor seconds.
MEASURES = {
    "WRITE, 4 contexts of 256 tokens (6 layers, 256 wide, vocabulary 8,192)": _MODEL
    + """
model = build(256, 6, 8192)
ids = torch.randint(0, 8192, (4, 256))
report(lambda: model.write(input_ids=ids), 5)
""",
    "WRITE, 8 contexts of 8 tokens (2 layers, 64 wide): what is not the products": _MODEL
    + """
model = build(64, 2, 64)
ids = torch.randint(0, 64, (8, 8))
report(lambda: [model.write(input_ids=ids) for _ in range(20)], 5)
""",
    "training step, exact, 16 contexts of 8 segments (4 layers, 128 wide)": _MODEL
    + """
model = build(128, 4, 70, write_prefix_segments=0, checkpoint_write_steps=False, learn_write_learning_rate="per_token")
model.base_model.requires_grad_(True)
model.train()
ids = torch.randint(0, 70, (16, 56))
segments = (torch.arange(56) // 7).expand(16, -1)
queries = torch.randint(0, 70, (16, 8, 8))
report(lambda: model(context_input_ids=ids, context_segment_ids=segments, input_ids=queries,
                     labels=queries).loss.backward(), 7)
""",
    "import hf_gradmem": "import time, hf_gradmem\nprint(time.process_time())",
    "hf-gradmem --help": """
import time, contextlib, io, sys
from hf_gradmem_cli import main
sys.argv = ["hf-gradmem", "--help"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
print(time.process_time())
""",
}


def measure(code: str, checkout: Path) -> float:
    """Processor seconds of one run of `code` in a checkout."""
    settings = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | settings,
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="directory of the other checkout")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each measure in each checkout")
    given = parser.parse_args()
    commit = subprocess.run(
        ["git", "-C", str(given.other), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    rows = []
    with tqdm(total=len(MEASURES) * given.rounds, unit="round") as bar:
        for name, code in MEASURES.items():
            pairs = []
            for turn in range(given.rounds + 1):
                order = (ROOT, given.other.resolve()) if turn % 2 else (given.other.resolve(), ROOT)
                seconds = {checkout: measure(code, checkout) for checkout in order}
                if turn:  # the first round fills the caches
                    pairs.append((seconds[ROOT], seconds[given.other.resolve()]))
                    bar.update()
            ratios = sorted(own / other for own, other in pairs)
            low, middle, high = statistics.quantiles(ratios, n=4)
            rows.append(
                f"| {name} | {statistics.median(own for own, _ in pairs):.3g} | {middle:.3f} [{low:.3f}–{high:.3f}] |"
            )
    text = [
        f"# Beside commit {commit}",
        "",
        f"Processor seconds on one thread, {given.rounds} runs of each, in turn: the median here, and the ratio to "
        "that commit as its median and quartiles. Command: `python -m benchmarks.against OTHER_CHECKOUT`.",
        "",
        "| | here, s | here / there |",
        "|---|---|---|",
        *rows,
    ]
    TABLE.write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
