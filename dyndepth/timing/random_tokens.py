"""What is timed where there is no text: random tokens, and methods that need none to be fitted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dyndepth.common.errors import UserError
from dyndepth.data.capacity import check_length, embeddings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dyndepth.method import DynamicDepthMethod


class RandomTokens:
    """Gives windows as a corpus does, of tokens drawn evenly from the vocabulary of a model or of
    one of its configuration."""

    def __init__(self, model_or_config: Any) -> None:
        self.vocabulary = embeddings(model_or_config)

    def windows(
        self, length: int, count: int, seed: int, split: str = "train", *, model: Any = None
    ) -> Tensor:
        """``count`` windows of ``length`` tokens, int64 ``[count, length]``, the same for the same
        ``seed``. Raises UserError for windows that ``model``, which is to read them, cannot take.
        """
        import torch

        if model is not None:
            check_length(model, length, "the windows of random tokens")
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocabulary, (count, length), generator=generator)


def fit_without_text(method: DynamicDepthMethod, model: torch.nn.Module) -> DynamicDepthMethod:
    """``method`` fitted from its seed on the model alone; nothing is kept. Raises UserError for a
    method that reads text to be fitted."""
    from dyndepth.models.seeding import seeded

    try:
        with seeded(method.seed, next(model.parameters()).device):
            return method.fit(model)
    except UserError as fault:
        raise UserError(
            f"{method.name} can't be fitted to random weights, for which there is no text "
            f"({fault}); take a method whose choice needs none, or a model with weights"
        ) from fault
