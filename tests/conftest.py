"""What holds for every test."""

from hypothesis import settings

# Two shared cores and forked ranks make single examples slow at random: no deadline of their own.
settings.register_profile("moebius", deadline=None, print_blob=True)
settings.load_profile("moebius")
