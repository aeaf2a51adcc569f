"""`broker-fl init`."""

from pathlib import Path
from typing import Annotated

import typer

TEMPLATE = """\
# A federation over RabbitMQ. Every key can also be given by the environment (BROKER_FL_SECTION__KEY) and by flags
# (--set section.key=value), which win over this file. What is commented out shows its default;
# where there is none, an example.

[federation]
name = "federation"                # the prefix of its exchanges and queues: fl.<name>.*

[broker]
url = "amqp://guest:guest@127.0.0.1:5672/"   # the aggregator's login; parties get their own by `broker-fl party add`
# management_url = "http://guest:guest@127.0.0.1:15672"   # where the management API is not at port 15672 of the same host
# ca = "certs/ca.pem"              # with amqps://host:5671/vhost: whom the broker's certificate must be from; see docs/tls.md
#   to log in by certificate: no name and password in url, certificate = "certs/NAME.pem", certificate_key = "certs/NAME.key"
# max_message_bytes = 16777216     # RabbitMQ's own limit; larger messages travel in parts

[task]
name = "digits"                    # digits | fashion_mnist | cifar10 | npz | path/to/file.py:TASK | package.module:TASK
# model = "small_cnn"              # small_cnn | tanh_cnn | federated_cnn | feature_cnn | linear
# features = "none"                # none | scattering, fixed features in place of the images; then model is linear by default
# data = "cifar10.npz"             # for the aggregator: held-out data, to evaluate versions on

[training]                         # what each local training does; it rides in every broadcast
epochs = 5                         # or steps = 50
batch_size = 32
optimizer = "sgd"                  # sgd | adam | adamw
learning_rate = 0.05
# decay_versions = 1000            # the learning rate falls linearly over so many versions, to decay_to of itself
# decay_to = 0.1
momentum = 0.9
# weight_decay = 0.0
# proximal = 0.0                   # FedProx's mu: pulls local training back to the model that it started from

[merging]
strategy = "fedasync"              # fedasync | fedbuff | fedavg
# mode = "delta"                   # delta: x += a * delta | mixing: x = (1 - a) * x + a * (base + delta)
mixing_rate = 0.3                  # of fedasync; with c parties at work, c * mixing_rate should stay near 1
staleness = "polynomial"           # constant | polynomial (1 + t)^-exponent | hinge
# exponent = 0.5
max_staleness = 32                 # in versions; later updates are refused, and their content kept by the party
# buffer_size = 10                 # of fedbuff and fedavg
# buffer_timeout_s = 60.0
# server_learning_rate = 1.0

[codec]
# up = "topk:0.01+int4"            # of updates: [SPARSIFIER+]QUANTIZER, as in topk:0.01+int4, randomk:0.05+int8, sign
down = "topk:0.05+int8"            # of what changed in the model from one broadcast to the next
# up_budget = "20kB"               # fits the density of `up` to so many bytes an update
# warm_up_versions = 0             # densities fall from warm_up_density to their own over so many versions
# warm_up_density = 0.25
# momentum_correction = 0.0        # DGC's momentum, kept by the workers over their updates
# keyframe = "float32"             # of whole models: float32 | float16 | bfloat16 | int8
# keyframe_every_frames = 100      # or sooner, where the changes since the last one cost more

# [privacy]                        # differential privacy of each example; see docs/privacy.md
# mechanism = "none"               # none | dp-sgd, in all workers; `up` is then eden:2 unless it is given
# target_epsilon = 8               # what planned_trainings of a party may cost; or noise_multiplier = 1.1
# planned_trainings = 100
# max_grad_norm = 1.0              # what the gradient of one example is clipped to
# delta = 1e-5                     # well below 1 / (examples of a party)
# max_epsilon = 8                  # in a party's own file: of all federations together, whatever they ask for

[aggregator]
state = "broker-fl-state"          # ledger and snapshots
broadcast_every_merges = 5
broadcast_every_s = 1.0
# versions = 1000                  # when the federation is over; without any of these it runs for ever
# seconds = 3600
# target_accuracy = 0.95
# fraction = 1.0                   # the share of parties that train from each broadcast
# snapshot_every_versions = 200

# [metrics]                        # for Prometheus; see docs/metrics.md
# host = "127.0.0.1"               # whoever reaches it may read them
# port = 9464                      # of the aggregator, or a worker; without one nothing is served
# evaluator_port = 9465            # of the evaluator that the aggregator starts

# [security]                       # see docs/security.md
# signatures = true                # of broadcasts by the federation's key, of updates by their party's
# key = "broker-fl-state/federation.key"   # the federation's private key, made where it is missing: keep it, and keep it secret

# [trust]                          # which updates count less, and who is shut out
# max_updates_per_minute = 600     # of one party; 0: no limit
# norm_factor = 4.0                # times the usual norm of the others: what is larger is scaled down to it
# outlier_factor = 40.0            # times the usual norm: what is larger is not merged
# direction = true                 # a party that pulls against where the model goes counts less
# tiers = {trusted = 1.0, standard = 1.0, probation = 0.25}   # `broker-fl party set NAME --tier probation`
# suspend_below = 0.3              # of a party's score, the running mean of what becomes of its updates; 0: nobody is

# [enrolment]                      # what the broker lets one party have
# max_connections = 4
# max_channels = 16

[worker]
state = "broker-fl-state"          # the outbox of each party
# device = "auto"                  # auto | cpu | cuda | mps
# precision = "float32"            # float32 | bfloat16
# channels_last = false

# [partition]                      # for trials where all workers hold one data set: each takes --share I/N of it
# scheme = "none"                  # iid | dirichlet | shards
# alpha = 0.5
"""


def command(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("federation.toml"),
) -> None:
    """Write a commented federation.toml to start from."""
    from broker_fl.errors import ConfigurationError

    try:
        with file.open("x", encoding="utf-8") as sink:
            sink.write(TEMPLATE)
    except FileExistsError as exc:
        raise ConfigurationError(f"{file} exists already: move it away first, or name another file") from exc
    except OSError as exc:
        raise ConfigurationError(f"{file} cannot be written: {exc}") from exc
    typer.echo(f"wrote {file}")
    typer.echo("next: broker-fl party add NAME; broker-fl aggregator; broker-fl worker --enrolment NAME.toml --data PATH")
