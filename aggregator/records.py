"""What the ledger holds: its tables, and their rows as values."""

from dataclasses import dataclass

from sqlalchemy import BigInteger, Boolean, Column, Float, Integer, LargeBinary, MetaData, String, Table, UniqueConstraint

FORMAT = "5"
"""Of the tables. Format 1 kept whole models as frames, from which no chain of changes can be made; format 2 had no hash chain;
format 3 did not say what an update cost its party's privacy; format 4 had no signatures."""

TABLES = MetaData()
_Counter = BigInteger().with_variant(Integer, "sqlite")

META = Table("meta", TABLES, Column("key", String(64), primary_key=True), Column("value", String, nullable=False))

ENTRIES = Table(
    "entries",
    TABLES,
    Column("seq", _Counter, primary_key=True),
    Column("kind", String(16), nullable=False),  # update | flush | merging | rollback | party | suspension
    Column("at", Float, nullable=False),
    Column("version", _Counter, nullable=False),  # of the model after this entry
    Column("party", String(64)),
    Column("update_id", String(32)),
    Column("sequence", _Counter),  # of the party's updates; of a party or its suspension, the membership's revision
    Column("base_version", _Counter),  # what an update was trained from, or a rollback goes back to
    Column("base_digest", String(64)),  # of the frame that it was trained from, by its party's word
    Column("num_samples", _Counter),
    Column("num_steps", _Counter),
    Column("noise_multiplier", Float),  # this and the next: of an update that was noised, by its party's word
    Column("sample_rate", Float),
    Column("train_loss", Float),
    Column("codec", String(64)),
    Column("size", _Counter),
    Column("outcome", String(16)),
    Column("reason", String(32)),
    Column("detail", String(1000)),
    Column("staleness", _Counter),
    Column("weight", Float),
    Column("factor", Float),  # the share of the weight that trust left
    Column("norm", Float),  # of the delta, and its cosine to where the model went
    Column("cosine", Float),
    Column("signature", String(128)),  # of the party, over what broker_fl/signing.py makes of this entry
    Column("payload_digest", String(64)),
    Column("model_digest", String(64), nullable=False),  # of the model after this entry
    Column("chain", String(64), nullable=False),  # binds this entry and all before it; see chain.py
    Column("payload", LargeBinary),  # of what was merged or buffered, until compaction; JSON for merging and party
    UniqueConstraint("party", "update_id"),
)

FRAMES = Table(
    "frames",
    TABLES,
    Column("number", _Counter, primary_key=True),
    Column("at", Float, nullable=False),
    Column("version", _Counter, nullable=False, index=True),
    Column("base", _Counter),  # the frame that it changes; none for the first
    Column("digest", String(64), nullable=False),  # of what the receivers hold after it
    Column("model_digest", String(64), nullable=False),  # of the model that it was made from
    Column("codec", String(64), nullable=False),  # of the payload
    Column("rounding", String(64)),
    Column("plan", String(64), nullable=False),  # digest of the plan in force; "" where a keyframe of it said another one
    Column("over", Boolean, nullable=False),
    Column("size", _Counter, nullable=False),  # of the body
    Column("log_bytes", _Counter, nullable=False),  # of the bodies of all delta frames up to this one
    Column("keyframe_codec", String(64)),
    Column("keyframe_size", _Counter),  # of the body in the keyframe log, where there is one
    Column("published_at", Float, index=True),
)

BODIES = Table(
    # Beside the frames, so that marking one as published does not write its body again.
    "bodies",
    TABLES,
    # frame: what the model log got | keyframe: the newest, and those that wait | start: whole models that the frames go on from
    Column("kind", String(8), primary_key=True),
    Column("number", _Counter, primary_key=True, autoincrement=False),
    Column("body", LargeBinary, nullable=False),
)

SNAPSHOTS = Table(
    "snapshots",
    TABLES,
    Column("seq", _Counter, primary_key=True),  # the last entry that is in it
    Column("version", _Counter, nullable=False),
    Column("file", String, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("at", Float, nullable=False),
)

PARTS = Table(
    "parts",
    TABLES,
    Column("party", String(64), primary_key=True),
    Column("update_id", String(32), primary_key=True),
    Column("part", Integer, primary_key=True),
    Column("parts", Integer, nullable=False),
    Column("size", _Counter, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("at", Float, nullable=False),
    Column("body", LargeBinary, nullable=False),
)


LEAD = Table(
    # One row: who may write.
    "lead",
    TABLES,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("epoch", _Counter, nullable=False),
    Column("holder", String(200), nullable=False),
    Column("at", Float, nullable=False),
    Column("let_go", Boolean, nullable=False),
    Column("is_brief", Boolean, nullable=False),
    Column("session", String(64), nullable=False),  # of the holder at a database server, so that it can be ended; else empty
)


@dataclass(frozen=True, slots=True)
class Entry:
    seq: int
    kind: str
    at: float
    version: int
    party: str | None = None
    update_id: str | None = None
    sequence: int | None = None
    base_version: int | None = None
    base_digest: str | None = None
    num_samples: int | None = None
    num_steps: int | None = None
    noise_multiplier: float | None = None
    sample_rate: float | None = None
    train_loss: float | None = None
    codec: str | None = None
    size: int | None = None
    outcome: str | None = None
    reason: str | None = None
    detail: str | None = None
    staleness: int | None = None
    weight: float | None = None
    factor: float | None = None
    norm: float | None = None
    cosine: float | None = None
    signature: str | None = None
    payload_digest: str | None = None
    model_digest: str = ""
    chain: str = ""
    """The ledger fills it in when the entry is appended."""
    payload: bytes | None = None


@dataclass(frozen=True, slots=True)
class FrameRow:
    number: int
    at: float
    version: int
    base: int | None
    digest: str
    model_digest: str
    codec: str
    rounding: str | None
    plan: str
    over: bool
    size: int
    log_bytes: int
    """Of the bodies of all delta frames up to this one, its own included."""
    keyframe_codec: str | None = None
    keyframe_size: int | None = None
    published_at: float | None = None
    body: bytes | None = None
    """For the model log. This one and the next are read only where they are asked for."""
    keyframe: bytes | None = None
    """For the keyframe log; None where there is none, or a newer one stands for it."""


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    seq: int
    version: int
    file: str
    sha256: str
    at: float


@dataclass(frozen=True, slots=True)
class PartRow:
    party: str
    update_id: str
    part: int
    parts: int
    size: int
    sha256: str
    at: float
    body: bytes


@dataclass(frozen=True, slots=True)
class Lead:
    """Who led the ledger last; `epoch` counts those who did."""

    epoch: int
    holder: str
    at: float
    let_go: bool
    """It ended in order; else it is at work, or was killed."""
    is_brief: bool
    """An operator's command, which lets go within seconds: worth waiting for."""


@dataclass(frozen=True, slots=True)
class Total:
    """One party's updates of one outcome; `size` in bytes."""

    party: str
    outcome: str
    updates: int
    size: int
    mean_staleness: float
    max_staleness: int


@dataclass(frozen=True, slots=True)
class FrameTotals:
    """What was published; sizes in bytes, codecs as of the newest."""

    frames: int
    size: int
    """Of the bodies in the model log."""
    keyframes: int
    keyframe_size: int
    codec: str
    keyframe_codec: str
