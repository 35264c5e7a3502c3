"""The state of torch.optim.LBFGS, whose history grows, in tensors whose shapes do not."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def pack(entry: dict[str, Any], history: int, parameters: list[Tensor]) -> dict[str, Any]:
    """The optimizer's state with a history of full length, of which the first `stored` count.

    Args:
        entry: `optimizer.state` of the first parameter.
        history: the optimizer's `history_size`.
        parameters: all of its parameters; the vectors are as long as all of them together.
    """
    size = sum(parameter.numel() for parameter in parameters)
    blank = parameters[0].detach().new_zeros(size)
    stored = len(entry.get("ro") or ())

    def vector(key: str) -> Tensor:
        value = entry.get(key)
        return blank.clone() if value is None else value

    def rows(key: str, row: Tensor) -> Tensor:
        table = row.new_zeros(history, *row.shape)
        for i, value in enumerate(entry.get(key) or ()):
            table[i] = value
        return table

    scale = entry.get("H_diag")
    return {
        "func_evals": entry.get("func_evals", 0),
        "n_iter": entry.get("n_iter", 0),
        "stored": stored,
        "d": vector("d"),
        "t": float(entry.get("t") or 0.0),
        "old_dirs": rows("old_dirs", blank),
        "old_stps": rows("old_stps", blank),
        "ro": rows("ro", blank.new_zeros(())),
        "H_diag": scale if isinstance(scale, Tensor) else blank.new_ones(()),
        "prev_flat_grad": vector("prev_flat_grad"),
        "prev_loss": float(entry.get("prev_loss") or 0.0),
    }


def unpack(packed: dict[str, Any]) -> dict[str, Any]:
    """What `pack` was given."""
    counts = {"func_evals": packed["func_evals"], "n_iter": packed["n_iter"]}
    if not packed["n_iter"]:  # it has only looked at a gradient that was small enough
        return counts
    stored = packed["stored"]
    history = {key: list(packed[key][:stored]) for key in ("old_dirs", "old_stps", "ro")}
    rest = {key: packed[key] for key in ("d", "t", "H_diag", "prev_flat_grad", "prev_loss")}
    return {**counts, **history, **rest}
