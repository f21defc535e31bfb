"""The quickstart's model and corpus as masked diffusion: it fills in masked tokens and sees both ways.

    python -m maxlm.train --config=configs/quickstart_diffusion.py

Figures of the last verified run are in docs/LOG.md, beside those of next-token prediction.
"""

import dataclasses

from configs import quickstart
from maxlm.config import Experiment


def get_config(arg: str = '') -> Experiment:
  config = quickstart.get_config()
  model = dataclasses.replace(config.model, vocab_size=4224, mask_token=4096)  # the tokenizer's are 0 … 4095
  return dataclasses.replace(config, name='quickstart_diffusion', model=model)
