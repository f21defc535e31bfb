"""One training step of transformers' Llama with PyTorch, eager, as its users run it on a CPU. Started by cpu.py."""

import torch
import transformers
import worker


def setup():
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=worker.VOCAB, hidden_size=worker.D_MODEL, intermediate_size=worker.D_FF,
    num_hidden_layers=worker.N_LAYERS, num_attention_heads=worker.N_HEADS, num_key_value_heads=worker.N_HEADS,
    head_dim=worker.HEAD_DIM, max_position_embeddings=worker.SEQ_LEN, tie_word_embeddings=False, use_cache=False,
    attn_implementation='sdpa')
  model = transformers.LlamaForCausalLM(config).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=worker.LEARNING_RATE, betas=(worker.BETA1, worker.BETA2),
                                eps=worker.EPS, weight_decay=worker.WEIGHT_DECAY, fused=True)

  def step() -> float:
    tokens = torch.randint(worker.VOCAB, (worker.BATCH, worker.SEQ_LEN))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), worker.CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  return step, {
    'versions': f'transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads',
    'parameters': sum(p.numel() for p in model.parameters())}


worker.serve(setup)
