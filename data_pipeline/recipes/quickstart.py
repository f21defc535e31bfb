"""The quickstart corpus: three real packages of documentation, about 20 MB of English text, in under a minute on 2 cores.

    python -m data_pipeline.build --recipe=quickstart --out=DIR

`quickstart` takes Debian packages (shell programming, political essays, a database manual: three kinds of text that a model
can be seen to tell apart), and where apt is missing or offline the documentation inside Python, with a notice.
`quickstart:debian` and `quickstart:python` insist on one of them.
"""

from data_pipeline.recipe import Recipe
from data_pipeline.sources.debian import DebianPackage
from data_pipeline.sources.python_docs import PythonLibrary, PythonReference


def get_recipe(origin: str = '') -> Recipe:
  settings = dict(vocab_size=4096, seq_lens=(256,), validation_fraction=0.05, min_bytes=200)
  debian = (DebianPackage(name='abs-guide'), DebianPackage(name='anarchism'), DebianPackage(name='postgresql-doc-15'))
  python = Recipe(name='quickstart-python', sources=(PythonReference(), PythonLibrary()), **settings)
  if origin == 'python':
    return python
  if origin not in ('', 'debian'):
    raise ValueError(f'quickstart:{origin}: after the colon say debian or python, or nothing for whichever there is')
  return Recipe(name='quickstart', sources=debian, fallback=None if origin else python, **settings)
