"""A short campaign of kills; docs/reliability.md has the long one."""

import pytest

from tests.chaos.campaign import Campaign, table


@pytest.mark.slow
def test_runs_that_are_killed_at_random_end_with_the_bits_of_one_that_was_not(tmp_path):
  campaign = Campaign(tmp_path, seed=1)
  for n_kills in (4, 3):
    campaign.run(n_kills)
  print(table(campaign))
  assert len(campaign.kills) >= 5 and campaign.ends == ['', ''], table(campaign)
