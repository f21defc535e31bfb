"""PyTorch's end of gpu.py: the same model and optimizer as its users would write them, compiled. Started by gpu.py.

fp32 weights and optimizer, bf16 products under autocast, scaled_dot_product_attention (FlashAttention or cuDNN, as it
chooses), fused AdamW; of experts, rows sorted by expert and `grouped_mm`. Rows hold one document.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import gpu_shapes as shapes
import torch
import torch.nn.functional as F
from torch import nn


def rotated(x_BNTH, cos, sin):
  first, second = x_BNTH.chunk(2, dim=-1)
  return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BNTH.dtype)


class Experts(nn.Module):
  def __init__(self, case):
    super().__init__()
    self.k, E, D, Fd = case.k, case.n_experts, case.d_model, case.d_ff
    self.router = nn.Linear(D, E, bias=False)
    self.w_gate, self.w_up = (nn.Parameter(torch.randn(E, D, Fd) * D**-0.5) for _ in range(2))
    self.w_down = nn.Parameter(torch.randn(E, Fd, D) * Fd**-0.5)

  def forward(self, x):
    x_CD = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
      scores = F.linear(x_CD.float(), self.router.weight).softmax(dim=-1)
    weights, experts = scores.topk(self.k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    order = experts.flatten().argsort(stable=True)
    token = order // self.k
    is_of = experts.flatten()[:, None] == torch.arange(self.w_up.shape[0], device=x.device)  # bincount would cut the graph
    ends = is_of.sum(dim=0).cumsum(0).to(torch.int32)
    rows = x_CD[token].bfloat16()
    product = lambda rows, w: F.grouped_mm(rows, w.bfloat16(), offs=ends)
    y = product(F.silu(product(rows, self.w_gate)) * product(rows, self.w_up), self.w_down)
    y = y[order.argsort()].view(*experts.shape, -1)
    return (y * weights[:, :, None]).sum(dim=1).to(x.dtype).reshape(x.shape)


class Mlp(nn.Module):
  def __init__(self, case):
    super().__init__()
    self.gate, self.up = (nn.Linear(case.d_model, case.d_ff, bias=False) for _ in range(2))
    self.down = nn.Linear(case.d_ff, case.d_model, bias=False)

  def forward(self, x):
    return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
  def __init__(self, case):
    super().__init__()
    self.case = case
    D, H = case.d_model, case.head_dim
    self.q = nn.Linear(D, case.n_heads * H, bias=False)
    self.k, self.v = (nn.Linear(D, case.n_kv_heads * H, bias=False) for _ in range(2))
    self.o = nn.Linear(case.n_heads * H, D, bias=False)
    self.mixer_norm, self.mlp_norm = (nn.RMSNorm(D, eps=shapes.NORM_EPS) for _ in range(2))
    self.q_norm, self.k_norm = (nn.RMSNorm(H, eps=shapes.NORM_EPS) for _ in range(2))
    self.mlp = Experts(case) if case.n_experts else Mlp(case)

  def forward(self, x, cos, sin):
    B, T, _ = x.shape
    h = self.mixer_norm(x)
    q, k, v = (w(h).view(B, T, -1, self.case.head_dim).transpose(1, 2) for w in (self.q, self.k, self.v))
    q, k = rotated(self.q_norm(q), cos, sin).to(v.dtype), rotated(self.k_norm(k), cos, sin).to(v.dtype)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + self.o(out.transpose(1, 2).reshape(B, T, -1))
    return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
  def __init__(self, case):
    super().__init__()
    self.embed = nn.Embedding(case.vocab, case.d_model)
    self.layers = nn.ModuleList(Layer(case) for _ in range(case.n_layers))
    self.norm = nn.RMSNorm(case.d_model, eps=shapes.NORM_EPS)
    self.head = nn.Linear(case.d_model, case.vocab, bias=False)
    frequency = shapes.ROPE_THETA ** (-torch.arange(0, case.head_dim, 2) / case.head_dim)
    angle = torch.arange(case.seq_len)[:, None] * frequency
    self.register_buffer('cos', angle.cos())
    self.register_buffer('sin', angle.sin())

  def forward(self, tokens, targets):
    x = self.embed(tokens).bfloat16()
    for layer in self.layers:
      x = layer(x, self.cos, self.sin)
    logits = self.head(self.norm(x))
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.flatten())


def main() -> None:
  case = shapes.case_of_argv()
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.manual_seed(0)
  torch.set_float32_matmul_precision('high')
  model = Model(case).to(device)
  decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith('embed')]
  others = [p for name, p in model.named_parameters() if p.ndim < 2 or name.startswith('embed')]
  optimizer = torch.optim.AdamW(
    [{'params': decayed, 'weight_decay': shapes.WEIGHT_DECAY}, {'params': others, 'weight_decay': 0.0}],
    lr=shapes.LEARNING_RATE, betas=(shapes.BETA1, shapes.BETA2), eps=shapes.EPS, fused=True)
  forward = torch.compile(model) if case.compiled else model

  def steps(n):
    for _ in range(n):
      tokens = torch.randint(case.vocab, (case.rows, case.seq_len + 1)).to(device)
      with torch.autocast(device, dtype=torch.bfloat16):
        loss = forward(tokens[:, :-1], tokens[:, 1:])
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), shapes.CLIP)
      optimizer.step()
      optimizer.zero_grad()
    return loss.item()  # waits for the loss; the next span waits for the rest

  wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
  started = time.perf_counter()
  first_loss = steps(1)
  wait()
  first_seconds = time.perf_counter() - started
  if case.warm_up > 1:
    steps(case.warm_up - 1)
  seconds = []
  for _ in range(case.spans):
    wait()
    started = time.perf_counter()
    loss = steps(case.steps)
    wait()
    seconds.append((time.perf_counter() - started) / case.steps)
  shapes.report({
    'versions': f'torch {torch.__version__}', 'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
    'seconds': seconds, 'first_step_seconds': first_seconds, 'first_loss': first_loss, 'loss': loss,
    'peak_bytes': torch.cuda.max_memory_allocated() if device == 'cuda' else None,
    'parameters': sum(p.numel() for p in model.parameters())})


if __name__ == '__main__':
  main()
