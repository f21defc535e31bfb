"""What a build left out and why: report.json."""

import pathlib

from data_pipeline import shards


def write(root: pathlib.Path, recipe, *, sources: list[dict], steps: list[list[dict]], selection: list[dict],
          rows: list[dict]) -> list[dict]:
  """Commits DIR/report.json; returns the entries of its files."""
  path = root / 'report.json'
  shards.write_json(path, {'recipe': recipe.name})
  return [shards.entry(root, path)]
