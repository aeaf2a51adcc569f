"""All attacks, in the order in which they are tried. Poisoning first: later on most parties are hostile and say what is usual."""

from attacks_contents import CONTENTS, POISON, POISONING
from attacks_floods import FLOODS
from attacks_identity import IDENTITY
from attacks_models import BROKER, MODEL
from attacks_queues import QUEUES

GROUPS = (POISONING, IDENTITY, MODEL, BROKER, QUEUES, FLOODS, CONTENTS, POISON)
ATTACKS = [attack for group in GROUPS for attack in group.attacks]
