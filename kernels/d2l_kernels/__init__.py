"""Operations that a Doc-to-LoRA hypernetwork needs, each with several backends.

Ragged inputs are described by `Segments`; no op pads one document to another.  `explain` says what
runs here and why, `use_backend` forces a choice.
"""

from .cross import cross_attention
from .dispatch import explain, use_backend
from .distill import topk_distill
from .latent import latent_attention
from .lora import segmented_lora
from .segments import Segments

__all__ = [
    "Segments",
    "cross_attention",
    "explain",
    "latent_attention",
    "segmented_lora",
    "topk_distill",
    "use_backend",
]
