"""Where in a row each token stands, and what it sees."""

import torch

from hf_gradmem.base.layout import packed_layout


def test_a_segment_sees_the_prefix_and_itself():
    mask, positions, predicting = packed_layout(torch.tensor([[0, 0, 2, 2, 4]]), 2, torch.float32)
    seen = mask[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 0, 1],
    ]
    assert positions.tolist() == [[0, 1, 2, 3, 2, 3, 2]]
    assert predicting.tolist() == [[1, 2, 1, 4, 1]]
