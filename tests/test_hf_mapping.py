"""The language in which a family says which of its tensors are which of our weights."""

import ml_dtypes
import numpy as np
import pytest

from maxlm.hf import convert
from maxlm.hf.mapping import Constant, Copy, Either, Given, Layout, LeftOut, Tensor, choose, within

BF16 = np.dtype(ml_dtypes.bfloat16)

# Sizes: D=6 N=4 K=2 H=3 E=5 F=7 G=2 P=5

MAPS = {
  'plain': (Tensor('q', 'NH D', 'w_q_DNH'), [(6, 4, 3)], lambda a: [a.reshape(4, 3, 6).transpose(2, 0, 1)]),
  'as it is': (Tensor('fc', 'D F', 'w_up_DF'), [(6, 7)], lambda a: [a]),
  'one after the other': (
    Tensor('qkv', '(NH|KH|KH) D', 'w_q_DNH | w_k_DKH | w_v_DKH'), [(6, 4, 3), (6, 2, 3), (6, 2, 3)],
    lambda a: [a[:12].reshape(4, 3, 6).transpose(2, 0, 1), a[12:18].reshape(2, 3, 6).transpose(2, 0, 1),
               a[18:].reshape(2, 3, 6).transpose(2, 0, 1)]),
  'columns one after the other': (
    Tensor('c_attn', 'D (NH|KH|KH)', 'w_q_DNH | w_k_DKH | w_v_DKH'), [(6, 4, 3), (6, 2, 3), (6, 2, 3)],
    lambda a: [a[:, :12].reshape(6, 4, 3), a[:, 12:18].reshape(6, 2, 3), a[:, 18:].reshape(6, 2, 3)]),
  'columns in turn': (Tensor('gate_up', 'E D F(1|1)', 'w_gate_EDF | w_up_EDF'), [(5, 6, 7)] * 2,
                      lambda a: [a[:, :, 0::2], a[:, :, 1::2]]),
  'within each head': (Tensor('q_gate', 'N(H|H) D', 'w_q_DNH | w_gate_DNH'), [(6, 4, 3)] * 2,
                       lambda a: [a.reshape(4, 2, 3, 6)[:, i].transpose(2, 0, 1) for i in (0, 1)]),
  'parts of unlike widths': (
    Tensor('kv_b', 'N(H|P) D', 'w_k_DNH | w_v_DNP'), [(6, 4, 3), (6, 4, 5)],
    lambda a: [a.reshape(4, 8, 6)[:, cut].transpose(2, 0, 1) for cut in (slice(3), slice(3, 8))]),
  'a dim taken apart': (
    Tensor('qkvz', 'K(H|GP|GP) D', 'w_k_DKH | w_v_DNP | w_z_DNP', {'N': 'KG', 'K': 2}), [(6, 2, 3), (6, 4, 5), (6, 4, 5)],
    lambda a: [a.reshape(2, 23, 6)[:, :3].transpose(2, 0, 1)] + [
      a.reshape(2, 23, 6)[:, i:i + 10].reshape(4, 5, 6).transpose(2, 0, 1) for i in (3, 13)]),
  'numbers of a head taken apart': (
    Tensor('ba', 'K(G|G) D', 'w_b_DN | w_a_DN', {'N': 'KG', 'K': 2}), [(6, 4)] * 2,
    lambda a: [a.reshape(2, 2, 2, 6)[:, i].reshape(4, 6).T for i in (0, 1)]),
  'a letter by another name': (Tensor('x', '(F|F) D', 'w_a_DF | w_b_DN', {'N': 'F'}), [(6, 7), (6, 7)],
                               lambda a: [a[:7].T, a[7:].T]),
  'a convolution': (Tensor('conv', '(NH|KH) 1 W', 'conv_x_WNH | conv_b_WKH'), [(4, 4, 3), (4, 2, 3)],
                    lambda a: [a[:12, 0].T.reshape(4, 4, 3), a[12:, 0].T.reshape(4, 2, 3)]),
  'one number': (Tensor('alpha', '1', 'alpha_p'), [()], lambda a: [a[0]]),
  'no dims': (Tensor('alpha', '', 'alpha_p'), [()], lambda a: [a]),
}


@pytest.mark.parametrize('tensor, shapes, expected', MAPS.values(), ids=MAPS)
def test_a_layout_is_read_as_it_says_and_written_back_bit_for_bit(tensor, shapes, expected):
  layout = Layout(tensor, shapes)
  theirs = np.random.default_rng(0).normal(size=layout.shape).astype(BF16)
  ours = [layout.read(theirs, part) for part in range(len(shapes))]
  for mine, wanted, shape in zip(ours, expected(theirs), shapes):
    assert mine.shape == shape
    np.testing.assert_array_equal(mine, wanted)
  again = np.zeros(layout.shape, BF16)
  for part, mine in enumerate(ours):
    layout.write(again, part, np.array(mine))
  np.testing.assert_array_equal(again, theirs)


@pytest.mark.parametrize('tensor, shapes, expected', [m for name, m in MAPS.items() if 'taken apart' not in name],
                         ids=[name for name in MAPS if 'taken apart' not in name])
def test_reading_a_layout_copies_nothing(tensor, shapes, expected):
  layout = Layout(tensor, shapes)
  theirs = np.zeros(layout.shape, BF16)
  assert all(np.shares_memory(layout.read(theirs, part), theirs) for part in range(len(shapes)))


def test_experts_in_tensors_of_their_own():
  layout = Layout(Tensor('experts.{E}.up', 'F D', 'w_up_EDF'), [(5, 6, 7)])
  assert layout.names == [f'experts.{e}.up' for e in range(5)] and layout.shape == (7, 6) and layout.each == 0
  assert layout.read(np.zeros((7, 6)), 0).shape == (6, 7)


@pytest.mark.parametrize('tensor, shapes, error', [
  (Tensor('q', 'NH F', 'w_q_DNH'), [(6, 4, 3)], AssertionError),
  (Tensor('q', 'NH', 'w_q_DNH'), [(6, 4, 3)], AssertionError),
  (Tensor('q', '(N|N) D', 'w_q_DN | w_k_DN'), [(6, 4), (5, 4)], ValueError),
  (Tensor('q', '(N|N|N) D', 'w_q_DN | w_k_DN'), [(6, 4), (6, 4)], AssertionError),
  (Tensor('q', 'K(G|G) D', 'w_q_DN | w_k_DN', {'N': 'KG', 'K': 3}), [(6, 4), (6, 4)], ValueError),
  (Tensor('q', 'n d', 'w_q_DN'), [(6, 4)], AssertionError),
])
def test_a_layout_that_does_not_fit_its_weights_is_refused(tensor, shapes, error):
  with pytest.raises(error, match='[qnd]'):
    Layout(tensor, shapes)


def test_the_way_whose_names_are_there_is_chosen_and_the_first_is_written():
  entries = [Either([Tensor('x.{E}.w', 'F D', 'w_EDF')], [Tensor('x.w', 'E F D', 'w_EDF')]), Tensor('y', 'D', 'y_D')]
  assert [entry.name for entry in choose(entries, ['x.0.w', 'x.1.w', 'y'])] == ['x.{E}.w', 'y']
  assert [entry.name for entry in choose(entries, ['x.w', 'y'])] == ['x.w', 'y']
  assert [entry.name for entry in choose(entries)] == ['x.{E}.w', 'y']
  nested = list(within('a.', 'b.', [*entries, Copy('z', of='y'), Constant('c', (1,), 0.5), LeftOut(r'\d', 'why'),
                                    Given('g_N', np.zeros(2))]))
  assert [tensor.name for tensor in choose(nested[:2], ['a.x.w'])] == ['a.x.w', 'a.y']
  assert nested[1].ours == 'b.y_D' and (nested[2].name, nested[2].of) == ('a.z', 'a.y') and nested[3].name == 'a.c'
  assert nested[4].pattern == r'a\.\d' and nested[5].ours == 'b.g_N'


@pytest.mark.parametrize('entries, says', [
  ([Tensor('a', 'D', 'a_D')], 'no tensor for b_D, c_DF$'),
  ([Tensor('a', 'D', 'a_D'), Tensor('bc', '(1|F) D', 'b_D | c_DF'), Tensor('x', 'D', 'a_D')], r'for a_D \(a and x\)'),
  ([Given('a_D', np.zeros(3)), Tensor('a', 'D', 'a_D'), Tensor('bc', '(1|F) D', 'b_D | c_DF')], 'a given value and a'),
  ([Tensor('a', 'D', 'a_D'), Tensor('bc', 'D', 'b_D'), Tensor('bc', 'F D', 'c_DF')], 'several weights for bc$'),
  ([Tensor('ax', '(1|1) D', 'a_D | x_D')], 'ax holds x_D, which this model does not have'),
])
def test_a_family_whose_tables_do_not_hold_each_weight_once_is_refused(entries, says):
  slots = {name: convert.Slot(name, None, shape) for name, shape in (('a_D', (3,)), ('b_D', (3,)), ('c_DF', (3, 2)))}
  with pytest.raises(ValueError, match=says):
    convert.bind([*entries, Tensor('none', 'D', 'nothing_D')], slots)
