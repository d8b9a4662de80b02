"""A denoiser of vectors: residual MLP blocks with adaLN-zero, the DiT (arXiv 2212.09748) without tokens."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.models.attention import RMSNorm, SwiGLU
from utils.models.dit import timestep_embedding

# Layers and hidden size, by the names of the DiT paper.
# fmt: off
VECTOR_MLP_SIZES = {
    "S":  (4, 256),
    "B":  (6, 512),
    "L":  (8, 1024),
    "XL": (12, 1536),
}
# fmt: on


class VectorBlock(nn.Module):
    """A gated feed-forward, shifted, scaled and gated by the conditioning vector. The gate starts at zero, so that a
    new block is the identity.
    """

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        self.norm = RMSNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = SwiGLU(dim, mlp_ratio)
        self.adaln = nn.Linear(dim, 3 * dim)

    def forward(self, values: Tensor, emb: Tensor) -> Tensor:
        shift, scale, gate = self.adaln(emb).chunk(3, dim=1)  # each (B, D)
        return values + gate * self.mlp(self.norm(values) * (1 + scale) + shift)


class VectorMLP(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts (B, `sample_size`) like its input from noisy latents, timesteps and conditions.

    `forward` names its arguments as `DiT.forward` does; conditions are pooled ones only, (B,
    `projection_class_embeddings_input_dim`).
    """

    _no_split_modules = ("VectorBlock",)
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 17,
        num_layers: int = 4,
        hidden_size: int = 256,
        mlp_ratio: float = 4.0,
        projection_class_embeddings_input_dim: int | None = None,
    ):
        super().__init__()
        self.embed = nn.Linear(sample_size, hidden_size)
        self.time_embed = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.pooled_embed = None
        if projection_class_embeddings_input_dim:
            self.pooled_embed = nn.Linear(projection_class_embeddings_input_dim, hidden_size)
        self.blocks = nn.ModuleList(VectorBlock(hidden_size, mlp_ratio) for _ in range(num_layers))
        self.norm_out = RMSNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.adaln_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, sample_size)
        self.gradient_checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, VectorBlock):
                nn.init.zeros_(module.adaln.weight)
        nn.init.zeros_(self.adaln_out.weight)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ):
        """`sample` (B, D), `timestep` (B,) in [0, 1000], `class_labels` pooled projections."""
        if encoder_hidden_states is not None or encoder_attention_mask is not None:
            raise ValueError("encoder_hidden_states: a vector has no cross-attention; pool the condition")
        values = self.embed(sample)  # (B, hidden)
        emb = self.time_embed(timestep_embedding(timestep.expand(len(sample)), 256).to(values.dtype))
        if self.pooled_embed is not None:
            emb = emb + self.pooled_embed(class_labels)
        emb = F.silu(emb)
        recompute = torch.is_grad_enabled() and self.gradient_checkpointing
        for block in self.blocks:
            values = checkpoint(block, values, emb, use_reentrant=False) if recompute else block(values, emb)
        shift, scale = self.adaln_out(emb).chunk(2, dim=1)
        output = self.proj_out(self.norm_out(values) * (1 + scale) + shift)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
