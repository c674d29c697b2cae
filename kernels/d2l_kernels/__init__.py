"""Operations that a Doc-to-LoRA hypernetwork needs, in plain torch.

Ragged inputs are described by `Segments`; no op pads one document to another.
"""

from .attention import cross_attention
from .distill import topk_distill
from .lora import segmented_lora
from .segments import Segments

__all__ = ["Segments", "cross_attention", "segmented_lora", "topk_distill"]
