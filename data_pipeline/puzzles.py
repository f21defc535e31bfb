"""Puzzles with answers that a program can check: sums, equations, sorting, traces of programs, look-ups in long tables.

Made by rule from a seed: nothing is fetched, document i is the same on any machine and in any corpus. Every problem is
worked out step by step and ends in a line `Answer: …`. What a level makes harder:

    arithmetic   operations: level + 1; numbers of up to `level` digits
    algebra      1: a x + b = c   2: x on both sides   3 and on: one more pair of brackets on a side each
    sorting      items: 2 · 2^level
    code_trace   a Python program of level + 3 statements after its variables are set; loops within loops from 3 on
    retrieval    hops: from 2 on the entry of a name leads to another name
"""

import operator
from collections.abc import Callable

_QUESTIONS = 4  # on each table
_SYLLABLES = 'ka to mi ren sol ba qui nes lor fa dun vi hel ost ra gem pu zan'.split()
_DOES = {'+': operator.add, '-': operator.sub, '*': operator.mul, '/': operator.floordiv, '//': operator.floordiv,
         '%': operator.mod, '<': operator.lt, '>': operator.gt, '==': operator.eq}

Pick = Callable  # of a sequence, one item: all chance comes from here


def document(kind: str, level: int, characters: int, pick: Pick) -> str:
  if kind == 'retrieval':
    return _retrieval(level, characters, pick)
  text = PROBLEMS[kind](level, pick)
  while len(text) < characters:
    text += '\n\n' + PROBLEMS[kind](level, pick)
  return text


# -- arithmetic: a tree is a number or (operation, left, right)


def _arithmetic(level: int, pick: Pick) -> str:
  tree = _tree(level + 1, 10**level, pick)
  lines = [f'Compute {_shown(tree)}.']
  while not isinstance(tree, int):
    tree = _reduced(tree)
    lines.append(f'= {_shown(tree)}')
  return '\n'.join([*lines, f'Answer: {tree}'])


def _tree(operations: int, largest: int, pick: Pick):
  """Every quotient in it is a whole number."""
  if not operations:
    return pick(range(1, largest))
  operation = pick('+-*/')
  if operation in '+-':
    left = pick(range(operations))
    return operation, _tree(left, largest, pick), _tree(operations - 1 - left, largest, pick)
  left = _tree(operations - 1, largest, pick)
  divisors = [number for number in range(2, 13) if _value(left) % number == 0]
  return ('/', left, pick(divisors)) if operation == '/' and divisors else ('*', left, pick(range(2, 13)))


def _value(tree) -> int:
  while not isinstance(tree, int):
    tree = _reduced(tree)
  return tree


def _reduced(tree):
  """The tree after its first operation on two numbers."""
  operation, left, right = tree
  if not isinstance(left, int):
    return operation, _reduced(left), right
  if not isinstance(right, int):
    return operation, left, _reduced(right)
  return _DOES[operation](left, right)


def _shown(tree, binds: int = 0) -> str:
  """binds: how strongly what stands beside it does; 0 for nothing."""
  if isinstance(tree, int):
    return f'({tree})' if tree < 0 and binds else str(tree)
  operation, left, right = tree
  own = 1 if operation in '+-' else 3
  text = f'{_shown(left, own)} {operation} {_shown(right, own + 1)}'
  return f'({text})' if own < binds else text


# -- algebra: a side is a list of terms (k, p, q), each k (p x + q)


def _algebra(level: int, pick: Pick) -> str:
  x, factors = pick(range(-9 * level, 9 * level + 1)), [*range(-9, 0), *range(1, 10)]
  brackets = lambda: [(pick(factors), 1, pick(factors)) for _ in range(level - 2)]
  left = [(pick(factors), 1, 0), *brackets(), (pick(factors), 0, 1)]
  right = [(pick(factors), 1, 0), *brackets()] if level > 1 else []
  if _sum(left, 1) == _sum(right, 1):
    left.append((1, 1, 0))  # else every x, or none, is an answer
  at = lambda side: sum(k * (p * x + q) for k, p, q in side)
  right.append((at(left) - at(right), 0, 1))
  name, (a, b), (c, d) = pick('abknptxyz'), *((_sum(side, 1), _sum(side, 2)) for side in (left, right))
  steps = [(left, right),
           *(((_opened(left), _opened(right)),) if level > 2 else ()),
           ([(a, 1, 0), (b, 0, 1)], [(c, 1, 0), (d, 0, 1)]),
           ([(a - c, 1, 0)], [(d - b, 0, 1)])]
  lines = [f'{_side(one, name)} = {_side(other, name)}' for one, other in steps]
  first, *others = dict.fromkeys([*lines, f'{name} = {x}'])
  return '\n'.join([f'Solve for {name}: {first}', *others, f'Check: both sides are {at(left)}.', f'Answer: {x}'])


def _sum(side: list, part: int) -> int:
  """All of x (part 1), or of what has none (part 2)."""
  return sum(term[0] * term[part] for term in side)


def _opened(side: list) -> list:
  return [one for k, p, q in side for one in ((k * p, 1, 0), (k * q, 0, 1)) if one[0]]


def _side(terms: list, name: str) -> str:
  text = ''
  for k, p, q in terms:
    size = '' if abs(k) == 1 and p else abs(k)
    word = f'{size}({name} {"-" if q < 0 else "+"} {abs(q)})' if p and q else f'{size}{name}' if p else f'{size}'
    if k:
      text += (' - ' if k < 0 else ' + ') * bool(text) + '-' * (k < 0 and not text) + word
  return text or '0'


# -- sorting


def _sorting(level: int, pick: Pick) -> str:
  n, down = 2 << level, pick((False, True))
  items = [_word(pick) for _ in range(n)] if pick((False, True)) else [pick(range(10 * n)) for _ in range(n)]
  lines = [f'Sort in {"descending" if down else "ascending"} order: {_listed(items)}']
  runs = [[item] for item in items]
  while len(runs) > 1:
    runs = [sorted(runs[i] + runs[i + 1], reverse=down) for i in range(0, len(runs), 2)]
    lines.append('Merge: ' + ' | '.join(map(_listed, runs)))
  return '\n'.join([*lines, f'Answer: {_listed(runs[0])}'])


def _listed(items: list) -> str:
  return ', '.join(map(str, items))


def _word(pick: Pick) -> str:
  return ''.join(pick(_SYLLABLES) for _ in range(pick((2, 3))))


# -- code_trace: a statement is (line, 'set', name, (a, operation, b)), (line, 'for', name, n, body) or
#    (line, 'if', (a, comparison, b), body, otherwise); a and b are names or numbers


def _code_trace(level: int, pick: Pick) -> str:
  names = ['a', 'b', 'c', 'd'][:2 + level // 2]
  source, trace, values = [f'{name} = {pick(range(1, 10 * level))}' for name in names], [], {}
  for line in source:
    values[line[0]] = int(line[4:])
  body = _block(level + 3, level, 0, names, source, pick)
  _execute(body, values, trace)
  shown = ', '.join(names)
  answer = ' '.join(str(values[name]) for name in names)
  return '\n'.join(['What does this program print?', '', *source, f'print({shown})', '', *trace, f'Answer: {answer}'])


def _block(n: int, level: int, depth: int, names: list, source: list, pick: Pick) -> list:
  """n statements, whose lines are added to source."""
  body, indent = [], '    ' * depth
  while n:
    kind = pick(('set', 'for', 'if') if n > 1 and depth < min(level, 3) else ('set',))
    inner, line = pick(range(1, n)) if n > 1 else 0, len(source) + 1
    if kind == 'set':
      name, value = pick(names), (pick(names), *pick([('+', pick(names)), ('-', pick(names)), ('+', pick(range(1, 10))),
                                                      ('*', pick((2, 3))), ('//', pick((2, 3))), ('%', pick(range(3, 12)))]))
      source.append(f'{indent}{name} = {" ".join(map(str, value))}')
      body.append((line, kind, name, value))
      n -= 1
    elif kind == 'for':
      times = pick(range(2, 3 + min(level, 3)))
      source.append(f'{indent}for {"ijk"[depth]} in range({times}):')
      body.append((line, kind, 'ijk'[depth], times, _block(inner, level, depth + 1, names, source, pick)))
      n -= inner + 1
    else:
      condition = names[depth % 2], pick(('<', '>', '==')), pick([*names[2:], names[1 - depth % 2], pick(range(1, 20))])
      source.append(f'{indent}if {" ".join(map(str, condition))}:')
      first = _block(inner, level, depth + 1, names, source, pick)
      source.append(f'{indent}else:')
      body.append((line, kind, condition, first, _block(1, level, depth + 1, names, source, pick)))
      n -= inner + 1
  return body


def _execute(body: list, values: dict, trace: list) -> None:
  """Runs statements as Python does; the trace says what each line did."""
  for line, kind, what, *rest in body:
    if kind == 'for':
      times, inner = rest
      for i in range(times):
        trace.append(f'line {line}: {what} = {i}')
        _execute(inner, values, trace)
      continue
    a, sign, b = what if kind == 'if' else rest[0]
    a, b = values.get(a, a), values.get(b, b)
    if kind == 'if':
      holds = _DOES[sign](a, b)
      trace.append(f'line {line}: {a} {sign} {b} is {holds}')
      _execute(rest[0] if holds else rest[1], values, trace)
    else:
      values[what] = _DOES[sign](a, b)
      trace.append(f'line {line}: {what} = {a} {sign} {b} = {values[what]}')


PROBLEMS = {'arithmetic': _arithmetic, 'algebra': _algebra, 'sorting': _sorting, 'code_trace': _code_trace}


# -- retrieval


def _retrieval(level: int, characters: int, pick: Pick) -> str:
  names, size = {}, 0
  while size < characters or len(names) < level:
    name = f'{_word(pick)}-{pick(range(1000, 10_000))}'
    size += 0 if name in names else len(name) + 3 + (7 + (level - 1) * (len(name) + 4)) // level
    names[name] = str(pick(range(1_000_000, 10_000_000)))
  order = [name for _, name in sorted((pick(range(1 << 40)), name) for name in names)]
  chains = [order[i:i + level] for i in range(0, len(order), level)]
  for chain in chains:
    names.update({name: f'see {following}' for name, following in zip(chain, chain[1:])})
  lines = ['Each name has a code, or leads to the name that has its code.' if level > 1 else 'Each name has a code.', '',
           *(f'{name}: {entry}' for name, entry in names.items())]
  for chain in [chain for chain in chains if len(chain) == level][:_QUESTIONS]:
    lines += ['', f'What is the code of {chain[0]}?', f'Answer: {", ".join([*chain[1:], names[chain[-1]]])}']
  return '\n'.join(lines)


def asked_and_answer(kind: str, text: str) -> tuple[str, str]:
  """A problem in two parts: what is given, and how it is worked out."""
  at = text.index('\n\n', text.index('print(')) if kind == 'code_trace' else text.index('\n')
  return text[:at], text[at:]
