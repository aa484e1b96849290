"""What tests of training run on two processes, started by torchrun: `train RECIPE_AS_JSON`, or `stream`."""

import json
import os
import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from hf_gradmem.tasks import load_task
from hf_gradmem.tasks.collator import DataCollatorForGradMem
from hf_gradmem.tasks.kv_retrieval import build_tokenizer
from hf_gradmem.training.recipe import make_recipe
from hf_gradmem.training.run import run_training

NUM_CONTEXTS = 12


def check_stream(dispatch_batches, num_shards, num_workers):
    """Every query of every batch is about its own context, and each context comes once over all processes."""
    configuration = DataLoaderConfiguration(dispatch_batches=dispatch_batches)
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    tokenizer = build_tokenizer()
    limits = {"max_context_length": 40, "max_query_length": 9, "queries_per_context": 4}
    collator = DataCollatorForGradMem(tokenizer, **limits, padding="max_length")
    rows = load_task("kv_retrieval", streaming=True, num_contexts=NUM_CONTEXTS, num_pairs=[2, 4], num_shards=num_shards)
    loader = accelerator.prepare(DataLoader(rows, batch_size=3, collate_fn=collator, num_workers=num_workers))
    seen = []
    for batch in loader:
        contexts = tokenizer.batch_decode(batch["context_input_ids"], skip_special_tokens=True)
        for context, queries, labels in zip(contexts, batch["input_ids"], batch["labels"], strict=True):
            asked = [query for query, label in zip(queries, labels, strict=True) if (label != -100).any()]
            assert len(asked) == context.count(":"), (context, asked)
            for text in tokenizer.batch_decode(torch.stack(asked), skip_special_tokens=True):
                assert text.removeprefix("?") in context, (context, text)
        seen += contexts
    everywhere = [None, None]
    torch.distributed.all_gather_object(everywhere, seen)
    expected = ["".join(row["context"]).rstrip("|") for row in rows]
    assert sorted(everywhere[0] + everywhere[1]) == sorted(expected)
    assert min(map(len, everywhere)) == NUM_CONTEXTS // 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "train":
        run_training(make_recipe(json.loads(sys.argv[2])))
    else:
        for dispatch_batches, num_shards, num_workers in ((True, 1, 0), (False, 1, 0), (False, 2, 0), (False, 4, 2)):
            check_stream(dispatch_batches, num_shards, num_workers)
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
    # Threads of PyTorch's may abort an interpreter that takes itself down around them; all that was asked is done.
    sys.stderr.flush()
    os._exit(0)
