"""Tasks for lm-evaluation-harness in local files: made-up text, the same bytes on any machine.

    python -m tests.make_tasks DIR      # then: python -m maxlm.evaluate --checkpoint=RUN --tasks=choices --task_dir=DIR

choices: which end a sentence has. letters: the same, answered by a letter. texts: stories, many longer than 64 tokens.
writing: the end of a sentence, in the model's words. The words are those of tests/make_corpus.py.
"""

import json
import random
import sys
from pathlib import Path

from tests.make_corpus import DID, WHAT, WHEN, WHO, story

FILES = '''task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {directory}/{name}-train.jsonl
    test: {directory}/{name}.jsonl
training_split: train
test_split: test
metadata:
  version: 1.0
'''
METRIC = """  - metric: {}
    aggregation: {}
    higher_is_better: {}
"""
ACCURACY = METRIC.format('acc', 'mean', 'true')
TASKS = {
  'choices': '''output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
''' + ACCURACY + METRIC.format('acc_norm', 'mean', 'true'),
  'letters': '''output_type: multiple_choice
doc_to_text: "{{question}}{% for choice in choices %}\\n{{'ABCD'[loop.index0]}}. {{choice}}{% endfor %}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
''' + ACCURACY,
  'texts': '''output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
''' + METRIC.format('byte_perplexity', 'weighted_perplexity', 'false') + METRIC.format(*2 * ['bits_per_byte'], 'false'),
  'writing': '''output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: [".", "\\n"]
  max_gen_toks: 12
metric_list:
''' + METRIC.format('exact_match', 'mean', 'true'),
}


def make_tasks(directory: Path, n_docs: int = 24) -> Path:
  """Writes the tasks into `directory`, which is returned; each has `n_docs` documents, and four more to show in prompts."""
  numbers = random.Random(1)
  pick = lambda options: options[int(numbers.random() * len(options))]
  directory.mkdir(parents=True, exist_ok=True)
  for name, text in TASKS.items():
    (directory / f'{name}.yaml').write_text(FILES.format(name=name, directory=directory) + text, encoding='utf-8')
    for split, n in (('-train', 4), ('', n_docs)):
      with open(directory / f'{name}{split}.jsonl', 'w', encoding='utf-8') as file:
        for _ in range(n):
          start = pick(range(len(WHAT)))
          doc = {'question': f'{pick(WHO)} {pick(DID)}'.capitalize(), 'answer': pick(range(4)),
                 'choices': [f'{WHAT[(start + i) % len(WHAT)]} {pick(WHEN)}' for i in range(4)],
                 'text': story(pick, pick((1, 3, 8, 13)))}
          file.write(json.dumps(doc) + '\n')
  return directory


if __name__ == '__main__':
  make_tasks(Path(sys.argv[1]))
