"""SSM: the PyTorch realisation of SSMSpec, module names as in Hugging Face's MambaForCausalLM.

Shape suffixes: B rows, L or T tokens, H hidden, D inner, N state, S heads of mamba2, G groups.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_training.data.batch import Batch
from mlx_training.errors import BackendError
from mlx_training.spec import SSMSpec
from torch_backend.decoder import MLP, Attention, Places
from torch_backend.layers import NORMS, KVCache, LanguageModel, Linear, RMSNorm
from torch_backend.scans import diagonal_ssm, filtered, recomputed, selective_scan, short_convolution, ssd

States = tuple[Tensor | None, ...]


class StateCache(KVCache):
    """What decoding remembers, of a size that does not grow: states, and keys and values within attention's window."""

    def __init__(self, num_layers: int, left_padding: Sequence[int], window: int) -> None:
        super().__init__(num_layers, left_padding)
        self.states: list[States] = [(None, None)] * num_layers
        self.window = window

    def append(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        old_k, old_v = self.keys[layer], self.values[layer]
        k = k_BKTD if old_k is None else torch.cat([old_k, k_BKTD], dim=2)
        v = v_BKTD if old_v is None else torch.cat([old_v, v_BKTD], dim=2)
        self.keys[layer], self.values[layer] = k[:, :, -self.window :], v[:, :, -self.window :]
        return k, v

    def mask(self, num_new: int) -> Tensor:
        """Who may look where among the keys that are kept, boolean (B, 1, T, S)."""
        first = max(self.length - self.window, 0)
        places = torch.arange(first, self.length + num_new)
        near = places[self.length - first :, None] - places[None] < self.window
        return super().mask(num_new)[..., first:] & near

    def is_real(self, num_new: int) -> Tensor | None:
        """Which of the next tokens are no padding (B, T); None: all, as after the first ones."""
        if self.length:
            return None
        return torch.arange(num_new)[None] >= self.left_padding[:, None]

    def select(self, rows: Sequence[int]) -> "StateCache":
        copy, index = StateCache(len(self.keys), [0], self.window), torch.tensor(rows)
        vars(copy).update(vars(super().select(rows)))
        copy.states = [tuple(None if x is None else x[index.to(x.device)] for x in layer) for layer in self.states]
        return copy


class Mixer(nn.Module):
    """A mixer that remembers by states."""

    def __init__(self, spec: SSMSpec, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer

    def remembered(self, places: Places) -> States:
        """The states after the tokens before."""
        return places.cache.states[self.layer] if isinstance(places.cache, StateCache) else (None, None)

    def remember(self, places: Places, *states: Tensor | None) -> None:
        """Keep states for the tokens that follow."""
        if isinstance(places.cache, StateCache):
            places.cache.states[self.layer] = states


class CausalConv(nn.Module):
    """Depthwise convolution over the last few tokens, then SiLU; zero in the padding."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, taps))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None, past_BSD: Tensor | None) -> tuple[Tensor, Tensor]:
        weight, bias = self.weight[:, 0].to(x_BTD.dtype), self.bias.to(x_BTD.dtype)
        y_BTD, past_BSD = short_convolution(_masked(x_BTD, real_BT), weight, bias, past_BSD)
        return _masked(F.silu(y_BTD), real_BT), past_BSD


class Mamba(Mixer):
    """Selective scan: dt, B and C depend on the token (Gu & Dao 2023)."""

    def __init__(self, spec: SSMSpec, layer: int) -> None:
        super().__init__(spec, layer)
        H, D, N = spec.hidden_size, spec.inner_size, spec.state_size
        self.in_proj = Linear(H, 2 * D, bias=False)
        self.conv1d = CausalConv(D, spec.conv_kernel)
        self.x_proj = Linear(D, spec.dt_rank + 2 * N, bias=False)
        self.dt_proj = Linear(spec.dt_rank, D)
        self.A_log, self.D = nn.Parameter(torch.zeros(D, N)), nn.Parameter(torch.ones(D))
        self.out_proj = Linear(D, H, bias=False)

    def forward(self, x_BTH: Tensor, places: Places) -> Tensor:
        past, state = self.remembered(places)
        x_BTD, z_BTD = self.in_proj(x_BTH).chunk(2, dim=-1)
        x_BTD, past = self.conv1d(x_BTD, places.real_BL, past)
        R, N = self.spec.dt_rank, self.spec.state_size
        dt_BTR, B_BTN, C_BTN = self.x_proj(x_BTD).split([R, N, N], dim=-1)
        dt_BTD = F.softplus(self.dt_proj(dt_BTR).float())
        scanned = (x_BTD.float(), dt_BTD, -torch.exp(self.A_log), B_BTN.float(), C_BTN.float(), self.D)
        y_BTD, state = recomputed(selective_scan, *scanned) if state is None else selective_scan(*scanned, state)
        self.remember(places, past, state)
        return self.out_proj(y_BTD.to(x_BTH.dtype) * F.silu(z_BTD))


class Mamba2(Mixer):
    """State-space duality: heads with one decay each, and a gated norm (Dao & Gu 2024)."""

    def __init__(self, spec: SSMSpec, layer: int) -> None:
        super().__init__(spec, layer)
        H, D, S, states = spec.hidden_size, spec.inner_size, spec.num_ssd_heads, spec.num_groups * spec.state_size
        self.in_proj = Linear(H, 2 * D + 2 * states + S, bias=False)
        self.conv1d = CausalConv(D + 2 * states, spec.conv_kernel)
        self.dt_bias, self.A_log = nn.Parameter(torch.zeros(S)), nn.Parameter(torch.zeros(S))
        self.D = nn.Parameter(torch.ones(S))
        self.norm = RMSNorm(D, spec.norm_eps)
        self.out_proj = Linear(D, H, bias=False)

    def forward(self, x_BTH: Tensor, places: Places) -> Tensor:
        past, state = self.remembered(places)
        (B, T, _), D, G = x_BTH.shape, self.spec.inner_size, self.spec.num_groups
        states = G * self.spec.state_size
        z_BTD, mixed, dt_BTS = self.in_proj(x_BTH).split([D, D + 2 * states, self.spec.num_ssd_heads], dim=-1)
        mixed, past = self.conv1d(mixed, places.real_BL, past)
        x, keys, queries = (part.float() for part in mixed.split([D, states, states], dim=-1))
        y, state = ssd(
            x.view(B, T, -1, self.spec.head_dim),
            F.softplus(dt_BTS.float() + self.dt_bias),
            -torch.exp(self.A_log),
            keys.view(B, T, G, -1),
            queries.view(B, T, G, -1),
            self.D,
            self.spec.chunk_size,
            state,
        )
        self.remember(places, past, state)
        gated = y.reshape(B, T, G, -1) * F.silu(z_BTD.float()).view(B, T, G, -1)
        normed = F.rms_norm(gated, (gated.shape[-1],), eps=self.norm.eps).view(B, T, D).to(x_BTH.dtype)
        return self.out_proj(normed * self.norm.weight.to(x_BTH.dtype))


class GatedS4D(Mixer):
    """BiGS's gated block (Wang et al. 2022) around one S4D (Gu et al. 2022), which looks back only."""

    def __init__(self, spec: SSMSpec, layer: int) -> None:
        super().__init__(spec, layer)
        H, D, pairs = spec.hidden_size, spec.inner_size, spec.state_size // 2
        self.in_proj, self.gate_proj = Linear(H, H, bias=False), Linear(H, D, bias=False)
        self.A_log, self.A_imag = nn.Parameter(torch.zeros(H, pairs)), nn.Parameter(torch.zeros(H, pairs))
        self.C, self.D = nn.Parameter(torch.zeros(H, pairs, 2)), nn.Parameter(torch.ones(H))
        self.dt_bias = nn.Parameter(torch.zeros(H))
        self.up_proj, self.out_proj = Linear(H, D, bias=False), Linear(D, H, bias=False)

    def forward(self, x_BTH: Tensor, places: Places) -> Tensor:
        real, imaginary = self.remembered(places)
        u_BTH = _masked(F.gelu(self.in_proj(x_BTH)), places.real_BL).float()
        y_BTH, state = diagonal_ssm(
            u_BTH,
            F.softplus(self.dt_bias),
            (-0.5 * torch.exp(self.A_log), self.A_imag),
            (self.C[..., 0], self.C[..., 1]),
            self.D,
            None if real is None or imaginary is None else (real, imaginary),
            keep=places.cache is not None,
        )
        self.remember(places, *(state or (None, None)))
        return self.out_proj(F.gelu(self.up_proj(y_BTH.to(x_BTH.dtype))) * F.gelu(self.gate_proj(x_BTH)))


class STU(Mixer):
    """Spectral filters (Agarwal et al. 2023), mixed to one kernel a channel: Flash STU's factored form.

    Filters with turned signs have weights of their own. With shared ones, as published, half of every kernel is zero.
    """

    def __init__(self, spec: SSMSpec, layer: int) -> None:
        super().__init__(spec, layer)
        self.in_proj = Linear(spec.hidden_size, spec.hidden_size, bias=False)
        self.filters = nn.Parameter(torch.zeros(2 * spec.num_filters, spec.hidden_size))
        self.register_buffer("spectrum", torch.from_numpy(spec.spectral_filters()), persistent=False)

    def forward(self, x_BTH: Tensor, places: Places) -> Tensor:
        past, _ = self.remembered(places)
        x = _masked(self.in_proj(x_BTH), places.real_BL).float()
        y_BTH, past = filtered(x, self.spectrum @ self.filters, past)
        self.remember(places, past, None)
        return y_BTH.to(x_BTH.dtype)


MIXERS = {"mamba": Mamba, "mamba2": Mamba2, "s4d": GatedS4D, "stu": STU}


class SSMLayer(nn.Module):
    """x + mixer(norm(x)), then the same with a SwiGLU where the spec has one."""

    def __init__(self, spec: SSMSpec, layer: int) -> None:
        super().__init__()
        norm, mixer = NORMS[spec.norm], spec.mixer(layer)
        self.norm = norm(spec.hidden_size, spec.norm_eps)
        self.mixer = Attention(spec.block(), layer) if mixer == "local" else MIXERS[mixer](spec, layer)
        if spec.intermediate_size:
            self.mlp_norm, self.mlp = norm(spec.hidden_size, spec.norm_eps), MLP(spec.block())
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x_BLH: Tensor, places: Places) -> Tensor:
        x_BLH = x_BLH + self.dropout(self.mixer(self.norm(x_BLH), places))
        return x_BLH + self.dropout(self.mlp(self.mlp_norm(x_BLH))) if hasattr(self, "mlp") else x_BLH


class Backbone(nn.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, spec: SSMSpec) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.dropout = nn.Dropout(spec.dropout)
        self.layers = nn.ModuleList([SSMLayer(spec, i) for i in range(spec.num_layers)])
        self.norm_f = NORMS[spec.norm](spec.hidden_size, spec.norm_eps)


class SSM(LanguageModel):
    """A state-space language model, trainable from scratch."""

    def __init__(self, spec: SSMSpec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.backbone = Backbone(spec)
        if not spec.tie_word_embeddings:
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.register_buffer("frequencies", torch.from_numpy(spec.block().rope_frequencies()), persistent=False)

    @property
    def lm(self) -> "SSM":
        """The language model that a session drives: this one."""
        return self

    def inputs(self, batch: Batch) -> Tensor:
        return self.embed(batch.tokens)

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Token embeddings (B, L, H) in the compute type."""
        return self.backbone.embeddings(tokens_BL).to(self.dtype)

    def hidden(self, x_BLH: Tensor, batch: Batch | None = None) -> Tensor:
        if batch is not None and batch.segments is not None:
            raise BackendError(
                "the ssm family carries its state through a whole row: documents that share a row would see each "
                "other. Give every document a row of its own, or take the decoder family"
            )
        return self._run(x_BLH, torch.arange(x_BLH.shape[1], device=x_BLH.device)[None], Places())

    @property
    def head_layer(self) -> nn.Module:
        return self.backbone.embeddings if self.spec.tie_word_embeddings else self.lm_head

    def make_cache(self, left_padding: Sequence[int]) -> StateCache:
        """An empty cache for rows with this much padding on the left."""
        return StateCache(self.spec.num_layers, left_padding, self.spec.window)

    def extend(self, x_BTH: Tensor, cache: StateCache) -> Tensor:
        """Hidden states (B, T, H) of new tokens after those in the cache."""
        num_new, device = x_BTH.shape[1], x_BTH.device
        real_BT = cache.is_real(num_new)
        places = Places(
            cache=cache,
            mask=cache.mask(num_new).to(device),
            real_BL=None if real_BT is None else real_BT.to(device),
        )
        h_BTH = self._run(x_BTH, cache.positions(num_new).to(device), places)
        cache.length += num_new
        return h_BTH

    def select(self, cache: StateCache, rows: Sequence[int]) -> StateCache:
        """A copy of these rows of a cache."""
        return cache.select(rows)

    def _run(self, x_BLH: Tensor, positions_BL: Tensor, places: Places) -> Tensor:
        places.angles_BLD = positions_BL[..., None].float() * self.frequencies
        x_BLH = self.backbone.dropout(x_BLH)
        for layer in self.backbone.layers:
            x_BLH = layer(x_BLH, places)
        return self.backbone.norm_f(x_BLH)


def _masked(x_BTD: Tensor, real_BT: Tensor | None) -> Tensor:
    """Zero in the padding."""
    return x_BTD if real_BT is None else x_BTD * real_BT[..., None]
