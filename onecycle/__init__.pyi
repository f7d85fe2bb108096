import schedules as schedules
from engine import *  # noqa: F403  # a list of the names would be a copy
