"""Writes tests/golden/peft: adapters that the library PEFT made and saved for tests/golden/hf/llama, and its logits.

    python tests/golden/make_peft_goldens.py

Run in a throw-away environment with torch, transformers and peft (last: 2.13, 5.23.0, 0.21.2). All adapters' weights are
random, none is at its beginning.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).parent
ALL = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
CASES = {'lora': dict(target_modules=['q_proj', 'v_proj', 'down_proj'], use_rslora=True),
         'dora': dict(target_modules=ALL, use_dora=True),
         'some_layers': dict(target_modules=['o_proj', 'up_proj'], layers_to_transform=[1])}

for name, case in CASES.items():
  torch.manual_seed(0)
  model = AutoModelForCausalLM.from_pretrained(GOLDEN / 'hf' / 'llama', dtype=torch.float32, attn_implementation='eager')
  model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=7, task_type='CAUSAL_LM', **case)).eval()
  for parameter_name, parameter in model.named_parameters():
    if 'lora' in parameter_name:
      parameter.data += 0.05 * torch.randn_like(parameter)
  tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 24))
  with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits.numpy()
  folder = GOLDEN / 'peft' / name
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder)
  (folder / 'README.md').unlink()
  config = json.loads((folder / 'adapter_config.json').read_text()) | {'base_model_name_or_path': 'llama'}
  (folder / 'adapter_config.json').write_text(json.dumps(config, indent=1, sort_keys=True) + '\n')
  np.savez(folder / 'golden.npz', tokens=tokens.astype(np.int32), logits=logits)
