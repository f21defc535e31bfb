"""maxlm.plan from its command line down: names of slices, a whole plan of a tiny config, what it says when it cannot.

Programs are compiled by libtpu for slices that are not here, in every test process at once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax
import pytest
from absl import flags as absl_flags

from maxlm.config import validate
from maxlm.flags import load_config
from maxlm.plan import __main__ as command
from maxlm.plan import hlo, program, read, schedule, search, timeline
from maxlm.plan.hardware import CHIPS, GiB
from maxlm.plan.memory import allocations
from maxlm.plan.network import network_of
from maxlm.plan.topology import parse

ROOT = Path(__file__).parents[1]


def tiny():
  config = load_config(str(ROOT / 'configs' / 'tiny.py'))
  config.model.n_layers, config.data.seq_len = 1, 128
  return config


@pytest.fixture
def plan_flags():
  """The command's flags at their defaults, before and after."""
  absl_flags.FLAGS(['plan'])
  yield absl_flags.FLAGS
  absl_flags.FLAGS.unparse_flags()


# -- slices


@pytest.mark.parametrize('name, chips, wrap', [
  ('v5p:4x4x4', 64, (True,) * 3), ('v5e:16x16', 256, (True, True, False)), ('v6e:8x16', 128, (False, True, False)),
  ('v4:2x2x1', 4, (False,) * 3), ('tpu7x:4x4x8', 128, (True,) * 3), ('v5p:2x4x4', 32, (False,) * 3),
  (' V5E:2X2 ', 4, (False,) * 3)])
def test_a_slice_is_a_torus_where_it_is_whole(name, chips, wrap):
  topology = parse(name)
  assert (topology.n_chips, topology.wrap) == (chips, wrap)


@pytest.mark.parametrize('name, message', [
  ('v5p-128', 'did you mean v5p:4x4x4'), ('v5litepod-256', 'did you mean v5e:16x16'),
  ('v7x:4x4x4', 'did you mean tpu7x:4x4x4'), ('v5p:3x5x7', 'v5p has no such slice; near it are v5p:4x4x8'),
  ('v6e:8x15', 'near it are v6e:8x16'), ('h100', 'v5p:4x4x4, v5e:16x16'), ('', 'a slice is generation:chips'),
  ('v5p:4x4', 'no such slice'), ('v4:0x4x4', 'no such slice')])
def test_another_name_is_answered_with_near_ones(name, message):
  with pytest.raises(ValueError, match=message) as error:
    parse(name)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, slices, devices', [
  ('v5e:2x2', 1, 4), ('v4:2x2x1', 1, 4), ('tpu7x:2x2x1', 1, 8), ('v5p:2x2x1', 2, 8)])
def test_slices_have_their_devices(name, slices, devices):
  topology = parse(name, slices)
  found = topology.devices()
  assert len(found) == devices == topology.n_chips * topology.chip.devices
  assert {d.device_kind for d in found} == {topology.chip.device_kind}
  assert len({getattr(d, 'slice_index', None) for d in found}) == slices


def test_less_than_a_slice_is_refused():
  with pytest.raises(ValueError, match='--slices=0'):
    parse('v5p:4x4x4', 0)


# -- a whole plan


def test_a_tiny_config_is_planned_from_the_command_line(tmp_path):
  out = subprocess.run(
    [sys.executable, '-m', 'maxlm.plan', '--config=configs/tiny.py', '--topology=v5e:2x2', '--config.model.n_layers=1',
     '--config.data.seq_len=128', '--price=2', f'--json={tmp_path}/plan.json', f'--plot={tmp_path}/plan.html',
     f'--hlo={tmp_path}/plan.hlo'], cwd=ROOT, capture_output=True, text=True, timeout=500,
    env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': f'{tmp_path}/cache'})
  assert out.returncode == 0, out.stderr
  assert all(len(line) <= 100 for line in out.stdout.splitlines())
  assert 'compiler-estimated' in out.stdout and 'measured' not in out.stdout.replace('nothing was measured', '')
  assert 'compiled train step' in out.stderr and 'compiled eval step' in out.stderr
  plan = json.loads((tmp_path / 'plan.json').read_text())
  train, evaluation = plan['programs']
  assert {k['name']: k['count'] for k in train['kernels']} == {'splash_mha_fwd': 1, 'splash_mha_dq': 1, 'splash_mha_dkv': 1}
  assert {k['name']: k['count'] for k in evaluation['kernels']} == {'splash_mha_fwd': 1}
  for step in (train, evaluation):
    assert step['flops']['program_over_traced'] == pytest.approx(1, abs=0.02)
    assert step['memory']['walked_peak'] > 0 and 0 < step['memory']['peak'] < step['memory']['capacity']
    seconds = {name: e['seconds'] for name, e in step['estimates'].items()}
    assert 0 < seconds['lower_bound'] <= seconds['scheduled'] <= seconds['serial'] * 1.001
    assert sum(step['sources'].values()) == pytest.approx(seconds['scheduled'])
    assert step['estimates']['scheduled']['dollars_per_1e12_tokens'] == pytest.approx(
      1e12 * seconds['scheduled'] / 1024 * 4 * 2 / 3600)
    assert not step['notes']
  assert train['tokens'] == 8 * 128 and plan['topology'] == 'v5e:2x2'
  text = (tmp_path / 'plan.hlo').read_text()
  assert hlo.parse(text).scheduled and (tmp_path / 'plan.hlo.eval').exists()
  assert '<svg' in (tmp_path / 'plan.html').read_text()


def test_a_program_that_was_compiled_before_is_read_from_jaxs_cache_directory(tmp_path, capsys):
  config, topology, before = tiny(), parse('v5e:2x2'), jax.config.jax_compilation_cache_dir
  mesh = program.mesh_for(config, topology)
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'cache'))
  try:
    first = program.compile_eval(config, topology, mesh)
    again = program.compile_eval(config, topology, mesh)
    config.loss.z_loss, config.model.logits_scale = 0.0, 0.5
    other = program.compile_eval(config, topology, mesh)
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
  assert (again.text, again.memory) == (first.text, first.memory) and other.text != first.text
  said = capsys.readouterr().err
  assert said.count('compiled eval step') == 2 and said.count('compiled before') == 1


def test_a_picture_has_a_lane_for_each_resource_and_nothing_past_its_edge():
  topology = parse('v5p:4x4x4')
  text = (ROOT / 'tests' / 'hlo' / 'scan_v5p.txt').read_text()
  config = tiny()
  config.data.batch_size = 64
  mesh = program.mesh_for(config, topology)
  span = schedule.walk(hlo.parse(text), network_of(topology, mesh))
  root = ElementTree.fromstring(timeline.svg(span, 'a < b'))
  space = '{http://www.w3.org/2000/svg}'
  words = {''.join(t.itertext()) for t in root.iter(f'{space}text')}
  assert {'core', 'wires x', 'wires y', 'wires z', 'a < b (compiler-estimated)'} <= words
  assert any(word.startswith('one round of 6') for word in words)
  assert all(float(r.get('x', 0)) + float(r.get('width')) <= timeline.WIDTH for r in root.iter(f'{space}rect'))


def test_a_program_that_is_not_ours_is_read_the_same_way():
  text = (ROOT / 'tests' / 'hlo' / 'product_v5p.txt').read_text()
  found = read.read_text(text, 'x', parse('v5p:2x2x1'), tokens=4096, model_flops=4e9)
  assert found['mesh'] == 'fsdp_x=2 fsdp_y=2'
  gather, = found['collectives']
  assert (gather['axes'], gather['kind'], gather['bytes']) == ('fsdp_x+fsdp_y', 'all-gather', 1024 * 4096 * 2 * 3 / 4)
  assert found['flops']['program'] == 2 * 1024 * 1024 * 4096
  assert found['estimates']['scheduled']['mfu'] == pytest.approx(
    1e9 / found['estimates']['scheduled']['seconds'] / CHIPS['v5p'].flops)
  renamed = read.read_text(text, 'x', parse('v5p:2x2x1'), mesh='a=1,b=4')
  assert renamed['collectives'][0]['axes'] == 'b'
  for mesh, message in (('a=3', 'is of 3 devices, and the slice has 4'), ('a', 'axes and sizes')):
    with pytest.raises(ValueError, match=message):
      read.read_text(text, 'x', parse('v5p:2x2x1'), mesh=mesh)


# -- what cannot be planned


def test_what_does_not_fit_is_one_line_with_what_to_change():
  config, topology = tiny(), parse('v5e:2x2')
  config.data.batch_size = 1 << 20
  with pytest.raises(program.Refused, match=r'train step does not fit v5e:2x2: it needs [\d.]+G of 15.75G') as error:
    program.compile_train(config, topology, program.mesh_for(config, topology))
  text = str(error.value)
  assert '\n' not in text and '--config.compute.remat=products' in text and '--config.microbatches=2' in text
  assert 'largest: ' in text and 'split 4 ways' in text


def test_the_largest_buffers_are_read_where_the_compiler_lists_them():
  text = ('RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm. Largest program allocations in hbm:\n\n  1. Size: 8.00G\n     '
          'Operator: op_name="jit(f)/mlp/dot_general"\n     Shape: bf16[4,8192]{1,0}\n     ===\n\n  2. Size: 1.00G\n     '
          'Shape: f32[8]{0}\n')
  assert allocations(text) == [('8.00G', 'bf16[4,8192] mlp/dot_general'), ('1.00G', 'f32[8]')]


def test_a_config_that_is_not_for_the_slice_is_refused():
  config = tiny()
  config.mesh.tensor = 3
  with pytest.raises(ValueError, match='needs a multiple of 3 devices'):
    program.mesh_for(config, parse('v5e:2x2'))
  config.model = None
  with pytest.raises(ValueError, match='plan a config that has a model'):
    program.mesh_for(config, parse('v5e:2x2'))


def test_flags_that_mean_nothing_are_refused(plan_flags, monkeypatch):
  with pytest.raises(ValueError, match='this config names no pod'):
    command.main(tiny())
  plan_flags.plot = 'x.png'
  with pytest.raises(ValueError, match='a picture is .html or .svg'):
    command.main(tiny())
  monkeypatch.setitem(sys.modules, 'libtpu', None)  # as where it is not installed
  with pytest.raises(ValueError, match=r"pip install 'maxlm\[plan\]'"):
    command.main(tiny())


# -- search


def test_candidates_are_valid_and_keep_less_where_they_recompute_more():
  config, topology = load_config(str(ROOT / 'configs' / 'llama3_8b.py')), parse('v5p:2x2x2')
  found = search.candidates(config, topology)
  assert [c.seconds for c in found] == sorted(c.seconds for c in found)
  by_mesh = {}
  for candidate in found:
    key = search.sizes_of(candidate.config.mesh), candidate.config.microbatches
    by_mesh.setdefault(key, {})[candidate.config.compute.remat] = candidate.memory
  for memory in by_mesh.values():
    assert memory['none'] > memory['products'] > memory['attention'] > memory['full']
  for candidate in found[::17]:
    validate(candidate.config, 'tpu', 8)
    assert f'--config.microbatches={candidate.config.microbatches}' in candidate.flags
  chosen = search.choose(found, 6)
  assert len(chosen) == 6 and len({search.sizes_of(c.config.mesh) for c in chosen}) >= 3


def test_a_search_where_nothing_fits_says_so():
  config = load_config(str(ROOT / 'configs' / 'llama3_70b.py'))
  config.data.batch_size = 8
  with pytest.raises(ValueError, match=r'no mesh of v5e:2x2 holds this config: .* GiB a device'):
    search.search(config, parse('v5e:2x2'), 1)


@pytest.mark.slow
def test_a_search_compiles_the_best_and_prints_the_flags():
  config, topology = tiny(), parse('v5e:2x2')
  found = search.search(config, topology, 2)
  assert len(found) == 2
  seconds = [f['estimates']['scheduled']['seconds'] for f in found]
  assert seconds == sorted(seconds)
  page = search.page(config, topology, found)
  assert found[0]['flags'].split() == [word for word in page.split() if word.startswith('--config')]
  assert all(len(line) <= 100 for line in page.splitlines())


# -- the 8B


@pytest.mark.slow
def test_an_8b_on_a_cube_gathers_twice_scatters_once_and_runs_attention_forward_once(tmp_path):
  out = subprocess.run([sys.executable, '-m', 'maxlm.plan', '--config=configs/llama3_8b.py', f'--json={tmp_path}/plan.json'],
                       cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': ''})
  assert out.returncode == 0, out.stderr
  train, _ = json.loads((tmp_path / 'plan.json').read_text())['programs']
  assert {k['name']: k['count'] for k in train['kernels']} == {f'splash_mha_{name}': 32 for name in ('fwd', 'dq', 'dkv')}
  assert train['flops']['program_over_traced'] == pytest.approx(1, abs=0.02)
  assert train['memory']['peak'] < 55 * GiB
  weights = 8.03e9 * 2  # bytes in bf16: two gathers and one scatter of them
  received = {kind: sum(c['bytes'] for c in train['collectives'] if c['kind'] == kind)
              for kind in ('all-gather', 'reduce-scatter', 'all-reduce')}
  assert received['all-gather'] == pytest.approx(2 * weights, rel=0.15)
  assert received['reduce-scatter'] == pytest.approx(weights, rel=0.15)
  assert received['all-reduce'] < 0.03 * weights
