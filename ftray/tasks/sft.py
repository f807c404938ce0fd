"""SFT: supervised fine-tuning by name; of preferences, the good answers are learnt."""

from ftray.data.good_answers import GoodAnswersTask
from ftray.tasks import causal


class Task(GoodAnswersTask, causal.Task):
    """As CAUSAL_LM, on the records of any objective over answers."""
