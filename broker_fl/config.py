"""Settings: flags over environment over enrolment file over federation.toml over defaults; frozen, and checked at the start."""

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from broker_fl.errors import ConfigurationError, nearest
from schemas.frame import TrainingPlan
from schemas.ids import FederationId, PartyId, PublicKey
from schemas.privacy import Accountant, Clipping, Delta, Epsilon, NoiseMultiplier, PrivacyPlan

ENVIRONMENT_PREFIX = "BROKER_FL_"

KEYFRAME_CODECS = ("float32", "float16", "bfloat16", "int8")
"""The dense codecs in which a whole model can be rounded to nearest, by everyone to the same bits."""

UPDATE_CODEC = "topk:0.01+int4"
NOISED_UPDATE_CODEC = "eden:2"
"""Where differential privacy is asked for: all values alike, since the largest ones are noise."""

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
PemKey = Literal["ca", "certificate", "certificate_key"]
PEM_KEYS: tuple[PemKey, ...] = get_args(PemKey)


class Section(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def is_pem(text: str) -> bool:
    return "-----BEGIN " in text


class FederationSettings(Section):
    name: FederationId = "federation"


class BrokerSettings(Section):
    url: SecretStr = SecretStr("amqp://guest:guest@127.0.0.1:5672/")
    management_url: SecretStr | None = None
    """http://user:password@host:15672; without it, the host and login of `url` at port 15672, or 15671 (https) where `url` is
    amqps."""
    ca: str | None = None
    """Whom an amqps:// broker's certificate must be from, and what is revoked, if there is a list among it; without it, whom this
    machine trusts. This and the next two are each a path, or the PEM text itself."""
    certificate: str | None = None
    """One's own, for brokers that ask for one. Without a password in `url`, it is the login too: as its common name."""
    certificate_key: SecretStr | None = None
    heartbeat_s: Positive = 10
    publish_timeout_s: PositiveFloat = 30.0
    max_message_bytes: Annotated[int, Field(ge=65_536, le=512 << 20)] = 16 << 20
    """The broker's own limit (16 MiB since RabbitMQ 4.0). What is larger travels in parts."""
    part_bytes: Annotated[int, Field(ge=1024, le=128 << 20)] = 1 << 20

    @field_validator("url")
    @classmethod
    def _is_amqp(cls, url: SecretStr) -> SecretStr:
        expected = "expected amqp://user:password@host:port/vhost (in a password, / is %2F and # is %23)"
        try:
            parts = urlsplit(url.get_secret_value())
            is_whole = parts.scheme in ("amqp", "amqps") and parts.hostname and parts.port != 0
        except ValueError:
            # Its message could show a part of the password.
            raise ValueError(expected) from None
        if not is_whole:
            raise ValueError(expected)
        return url

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.part_bytes >= self.max_message_bytes:
            raise ValueError("part_bytes must be below max_message_bytes")
        return self

    @model_validator(mode="after")
    def _is_tls(self) -> Self:
        if (self.certificate is None) != (self.certificate_key is None):
            raise ValueError("certificate and certificate_key go together")
        if self.certificate is not None and not self.is_tls:
            raise ValueError("a certificate goes with amqps://host:5671/vhost: over amqp:// nothing would be encrypted")
        return self

    @property
    def is_tls(self) -> bool:
        return urlsplit(self.url.get_secret_value()).scheme == "amqps"

    @property
    def logs_in_by_certificate(self) -> bool:
        """SASL EXTERNAL, in place of name and password."""
        return self.certificate is not None and not urlsplit(self.url.get_secret_value()).password

    def management(self) -> SecretStr:
        """Raises ConfigurationError where there is no password for it: the management API takes no certificate for a login."""
        if self.management_url is not None:
            return self.management_url
        amqp = urlsplit(self.url.get_secret_value())
        scheme, port = ("https", 15671) if self.is_tls else ("http", 15672)
        host = f"[{amqp.hostname}]" if ":" in (amqp.hostname or "") else amqp.hostname
        if self.logs_in_by_certificate:
            raise ConfigurationError(
                "the management API takes no certificate for a login: give a user's name and password by [broker] "
                f"management_url = {scheme}://USER:PASSWORD@{host}:{port}"
            )
        login, _, _ = amqp.netloc.rpartition("@")
        return SecretStr(f"{scheme}://{login or 'guest:guest'}@{host}:{port}")

    def user(self) -> str:
        """Raises ConfigurationError where it is the name in a certificate that cannot be read, or that `url` contradicts."""
        named = unquote(urlsplit(self.url.get_secret_value()).username or "")
        if not self.logs_in_by_certificate:
            return named or "guest"
        # It takes a tenth of a second to import, and most do without it.
        from broker_fl.certificates import common_name

        name = common_name(self.pem("certificate"), what="[broker] certificate")
        if named not in ("", name):
            raise ConfigurationError(f"[broker] url says user {named!r}, and [broker] certificate is for {name!r}")
        return name

    def written(self, key: PemKey) -> str:
        """The setting as it is, a path or a text; "" where it is not set."""
        value = getattr(self, key)
        return value.get_secret_value() if isinstance(value, SecretStr) else value or ""

    def pem(self, key: PemKey) -> str:
        """The text, read from its file where the setting is a path; "" where it is not set. Raises ConfigurationError."""
        written = self.written(key)
        if not written or is_pem(written):
            return written
        try:
            return Path(written).read_text(encoding="utf-8")
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "not text"
            # What should be the path of a key may be the key.
            shown = "the file" if key == "certificate_key" else repr(written[:200])
            raise ConfigurationError(f"[broker] {key}: {shown} cannot be read ({reason}): expected a path or PEM text") from None

    def vhost(self) -> str:
        return unquote(urlsplit(self.url.get_secret_value()).path.removeprefix("/")) or "/"

    def host_and_port(self) -> tuple[str, int]:
        amqp = urlsplit(self.url.get_secret_value())
        return amqp.hostname or "", amqp.port or (5671 if self.is_tls else 5672)

    def address(self) -> str:
        """Where the broker is, without the login: for messages."""
        host, port = self.host_and_port()
        return f"{host}:{port}"


class TaskSettings(Section):
    name: str = "digits"
    """A built-in task, path/to/file.py:TASK or package.module:TASK."""
    model: str | None = None
    """Of a built-in task; without it small_cnn, or linear on features."""
    features: Literal["none", "scattering"] = "none"
    """Of a built-in task: what the model gets in place of the images."""
    classes: Annotated[int | None, Field(ge=2)] = None
    """Of `npz`, where a party's own file does not show all of them."""
    image_shape: tuple[Positive, Positive, Positive] | None = None
    """Of `npz`: channels, height, width; without it, read from the data."""
    data: Path | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the model's first weights."""


class PartitionSettings(Section):
    """How a data set that all workers hold is dealt out, for trials; `none` where each party has its own data."""

    scheme: Literal["none", "iid", "dirichlet", "shards"] = "none"
    alpha: PositiveFloat = 0.5
    shards_per_party: Positive = 2
    sizes: tuple[PositiveFloat, ...] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class MergingSettings(Section):
    """Which fold merges the updates; aggregator/merging/strategies.py says what each setting does."""

    strategy: Literal["fedasync", "fedbuff", "fedavg"] = "fedasync"
    mode: Literal["delta", "mixing"] = "delta"
    mixing_rate: Annotated[float, Field(gt=0, le=1)] = 0.3
    staleness: Literal["constant", "polynomial", "hinge"] = "polynomial"
    exponent: Annotated[float, Field(ge=0, le=10)] = 0.5
    """The a of the polynomial and of the hinge. Far larger ones would make a late update's weight 0."""
    hinge: Annotated[int, Field(ge=0)] = 4
    """The b of the hinge: no discount up to this staleness."""
    max_staleness: Annotated[int, Field(ge=0)] = 32
    """In versions; an update beyond it is refused."""
    buffer_size: Positive = 10
    buffer_timeout_s: PositiveFloat = 60.0
    """A buffer that is not full by then is merged as it is, so that an absent party cannot stop the others."""
    server_learning_rate: PositiveFloat = 1.0
    clip_norm: PositiveFloat | None = None
    """Each delta is clipped to this L2 norm before it is added to a buffer."""
    noise_multiplier: NoiseMultiplier | None = None
    """Client-level differential privacy: of the Gaussian noise that is added to each buffer's sum, over `clip_norm`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.noise_multiplier is not None and self.clip_norm is None:
            raise ValueError("noise_multiplier needs a clip_norm: without it no noise covers what one party may add")
        if self.clip_norm is not None and self.strategy == "fedasync":
            raise ValueError("clip_norm goes with a buffer (strategy = 'fedbuff' or 'fedavg'): fedasync merges each update alone")
        if self.mode == "mixing" and self.strategy != "fedasync":
            raise ValueError(f"mode = 'mixing' goes with strategy = 'fedasync', not {self.strategy!r}")
        return self


class CodecSettings(Section):
    """How updates and broadcasts are encoded; broker_fl/codecs/codec.py says which names there are."""

    up: str | None = None
    """Without it, topk:0.01+int4; under differential privacy, eden:2."""
    up_budget: ByteSize | None = None
    """Bytes of an update, as in "20kB": the density of `up` is fitted to it."""
    warm_up_versions: Annotated[int, Field(ge=0)] = 0
    """The densities of `up` and `down` fall exponentially from `warm_up_density` to their own over so many versions: a start with
    few values is slow (DGC, Lin et al. 2018)."""
    warm_up_density: Annotated[float, Field(gt=0, le=1)] = 0.25
    momentum_correction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The momentum that workers keep over their updates (DGC); 0 is plain error feedback."""
    down: str = "topk:0.05+int8"
    """Of delta frames."""
    keyframe: str = "float32"
    """Of whole models: float32, float16, bfloat16 or int8."""
    keyframe_every_frames: Positive = 100
    """Sooner where the delta frames since the last keyframe cost more than a whole model."""

    @field_validator("keyframe")
    @classmethod
    def _is_dense(cls, keyframe: str) -> str:
        if keyframe not in KEYFRAME_CODECS:
            raise ValueError(f"a keyframe holds the whole model: {nearest(keyframe, KEYFRAME_CODECS)}")
        return keyframe

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.up_budget is not None and self.warm_up_versions:
            raise ValueError("up_budget does not go with warm_up_versions, which begins with larger updates")
        return self


class PrivacySettings(Section):
    """Differential privacy of single examples, by DP-SGD in the workers; broker_fl/privacy/policy.py says how it adds up.

    With the aggregator: what it asks of all parties, and checks. In a party's own file: what that party allows, whatever a
    federation asks for. There, a noise is the least, and a target the most.
    """

    mechanism: Literal["none", "dp-sgd"] = "none"
    noise_multiplier: NoiseMultiplier | None = None
    """Standard deviation of the noise over `max_grad_norm`."""
    target_epsilon: Epsilon | None = None
    """In place of a noise: what `planned_trainings` of a party cost."""
    planned_trainings: Positive | None = None
    max_grad_norm: PositiveFloat = 1.0
    """What the gradient of one example is clipped to, in L2."""
    clipping: Clipping = "auto"
    """flat: each example's gradient is kept; ghost: only its norm, in two passes; auto: ghost for large models."""
    delta: Delta = 1e-5
    accountant: Accountant = "rdp"
    max_epsilon: Epsilon | None = None
    """What a party may spend; without it, the target."""
    min_noise_multiplier: NoiseMultiplier | None = None
    allow_topk: bool = False
    """Codecs that send the largest values, which after noise are the largest noise."""
    record: Path | None = None
    """The file in which a party keeps what its data has cost; one for all federations that use the same data. Without it,
    `privacy-PARTY.db` in the worker's state folder."""

    @model_validator(mode="after")
    def _is_a_bound(self) -> Self:
        if self.accountant == "gdp" and self.most_epsilon is not None:
            raise ValueError("accountant = 'gdp' may say too little, and is no bound for an epsilon: take rdp or prv")
        return self

    @property
    def is_asked_for(self) -> bool:
        return self.mechanism != "none"

    @property
    def most_epsilon(self) -> float | None:
        return self.max_epsilon if self.max_epsilon is not None else self.target_epsilon

    @property
    def least_noise(self) -> float | None:
        given = [noise for noise in (self.noise_multiplier, self.min_noise_multiplier) if noise is not None]
        return max(given, default=None)

    def plan(self) -> PrivacyPlan | None:
        """As it rides in the frames. Raises ConfigurationError where it does not say how much noise."""
        if not self.is_asked_for:
            return None
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ConfigurationError(
                "[privacy] mechanism = 'dp-sgd' needs either noise_multiplier, or target_epsilon with planned_trainings"
            )
        if (self.target_epsilon is None) != (self.planned_trainings is None):
            raise ConfigurationError(
                "[privacy] target_epsilon and planned_trainings go together: the noise is what so many trainings of a party need "
                "to cost that epsilon"
            )
        return PrivacyPlan(
            noise_multiplier=self.noise_multiplier,
            target_epsilon=self.target_epsilon,
            planned_trainings=self.planned_trainings,
            max_grad_norm=self.max_grad_norm,
            clipping=self.clipping,
            delta=self.delta,
            accountant=self.accountant,
            max_epsilon=self.most_epsilon,
        )


class AggregatorSettings(Section):
    state: Path = Path("broker-fl-state")
    """Folder of the ledger and, unless `snapshots` says otherwise, of the snapshots."""
    ledger: SecretStr | None = None
    """postgresql+psycopg://user:password@host/database, where the ledger must survive its machine; without it, SQLite in
    `state`.
    """
    snapshots: str | None = None
    """A folder, or an fsspec URL such as s3://bucket/path. Aggregators that stand by for each other share it, as the ledger."""
    snapshot_every_versions: Positive = 200
    broadcast_every_merges: Positive = 5
    broadcast_every_s: PositiveFloat = 1.0
    """A new version is broadcast after so many merges or seconds, whichever comes first."""
    versions: Positive | None = None
    seconds: PositiveFloat | None = None
    target_accuracy: Annotated[float | None, Field(gt=0, le=1)] = None
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of parties that train from each frame."""
    max_update_norm: PositiveFloat | None = None
    max_update_bytes: Positive | None = None
    """Without it, a dense float32 update and 64 KiB."""
    prefetch: Annotated[int, Field(ge=1, le=65_535)] = 64
    group_updates: Annotated[int, Field(ge=1, le=4096)] = 64
    group_ms: Annotated[float, Field(ge=0, le=10_000)] = 20.0
    """One commit holds what arrives within so many milliseconds, at most `group_updates`."""
    parts_expire_s: PositiveFloat = 3600.0
    """A half-sent update is forgotten when no part of it came for so long."""


class WorkerSettings(Section):
    party: PartyId | None = None
    state: Path = Path("broker-fl-state")
    """Folder of the outbox."""
    share: str | None = None
    """I/N: this worker takes the I-th of N parts of the partition."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False
    threads: Positive | None = None
    """Of torch; without it, torch's own choice."""
    examples_at_once: Positive | None = None
    """Under differential privacy each example's gradient takes memory: larger batches are worked through in parts of it."""
    throttle: Annotated[float, Field(ge=1, le=1000)] = 1.0
    """Makes training so many times slower, to try out how a federation bears a slow party."""
    budget: ByteSize | None = None
    """Bytes of an update, as in "20kB", where this party's line bears less than the federation's codec takes."""
    budget_seconds: PositiveFloat | None = None
    """How long an update may take to send, by what this worker measured of its line."""
    resend_after_s: PositiveFloat = 120.0
    """A confirmed update that nobody answered is sent again after so long, and then ever more rarely."""

    @field_validator("share")
    @classmethod
    def _is_share(cls, share: str | None) -> str | None:
        if share is not None:
            index, _, parties = share.partition("/")
            if not (index.isdigit() and parties.isdigit() and 1 <= int(index) <= int(parties)):
                raise ValueError(f"expected I/N with 1 <= I <= N, as in 2/5, not {share!r}")
        return share


class EvaluationSettings(Section):
    enabled: bool = True
    batch_size: Positive = 512
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


class SecuritySettings(Section):
    """Whose word counts; broker_fl/signing.py says what is signed."""

    signatures: bool = True
    """Of frames and receipts by the federation's key, of updates by their party's. Without them whoever runs the broker can put
    words into everyone's mouth."""
    key: Path | None = None
    """File of the federation's private key, for aggregators and enrolment; without it, `federation.key` in the aggregator's state
    folder."""
    aggregator_key: PublicKey | None = None
    """The federation's public key, which a party was given with its enrolment: only frames that it signed are followed."""
    party_key: SecretStr | None = None
    """The party's private key, 64 hexadecimal digits."""


class TrustSettings(Section):
    """Which updates count less, and who is shut out; aggregator/trust.py says how."""

    max_updates_per_minute: Annotated[int, Field(ge=0)] = 600
    """Of one party; as many may come at once. What is more is refused, and its content stays with the party. 0: no limit."""
    norm_factor: Annotated[float, Field(ge=0)] = 4.0
    """Times the usual norm of the others' updates: what is larger is scaled down to it. 0: nothing is."""
    outlier_factor: Annotated[float, Field(ge=0)] = 40.0
    """Times the usual norm: what is larger is not merged, and its content dropped. 0: nothing is."""
    direction: bool = True
    """Whether a party that pulls against the running direction of the model counts less; takes one more vector in memory."""
    direction_weight: Annotated[float, Field(gt=0, le=1)] = 0.1
    tiers: Mapping[str, Annotated[float, Field(gt=0, le=1)]] = {"trusted": 1.0, "standard": 1.0, "probation": 0.25}
    """What the updates of a tier weigh."""
    suspend_below: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Of a score that is 1 at first and the running mean of what becomes of a party's updates (each counts a tenth). 0: nobody
    is suspended but by an operator."""

    def weight_of(self, tier: str) -> float:
        """A tier that the settings do not know weighs as the least of those that they do."""
        return self.tiers.get(tier, min(self.tiers.values(), default=1.0))


class EnrolmentSettings(Section):
    """What the broker lets one party have. A worker takes two connections, and for some seconds two more after a lost line."""

    max_connections: Positive = 4
    max_channels: Positive = 16
    inbox_messages: Positive = 10_000
    inbox_bytes: ByteSize = ByteSize(64 << 20)
    inbox_ttl_s: Positive = 30 * 24 * 3600
    vhost_max_connections: Positive | None = None
    """Of the whole virtual host; only for one that the federation has to itself."""
    vhost_max_queues: Positive | None = None


class MetricsSettings(Section):
    """Where Prometheus finds what each process counts; docs/metrics.md says what that is."""

    host: str = "127.0.0.1"
    port: Annotated[int | None, Field(ge=0, le=65_535)] = None
    """Of an aggregator or a worker; without one nothing is served, and 0 takes any that is free."""
    evaluator_port: Annotated[int | None, Field(ge=0, le=65_535)] = None
    """Of an evaluator, which an aggregator starts with its own settings."""


class TrainingSettings(TrainingPlan):
    """The same fields as ride in each frame; here a mistyped key is an error."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    def plan(self) -> TrainingPlan:
        return TrainingPlan(**self.model_dump())


class Settings(BaseSettings):
    """All of federation.toml. `load_settings` fills it; nothing else reads files or the environment for it."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", hide_input_in_errors=True
    )

    federation: FederationSettings = FederationSettings()
    broker: BrokerSettings = BrokerSettings()
    task: TaskSettings = TaskSettings()
    partition: PartitionSettings = PartitionSettings()
    training: TrainingSettings = TrainingSettings()
    merging: MergingSettings = MergingSettings()
    codec: CodecSettings = CodecSettings()
    aggregator: AggregatorSettings = AggregatorSettings()
    worker: WorkerSettings = WorkerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    privacy: PrivacySettings = PrivacySettings()
    security: SecuritySettings = SecuritySettings()
    enrolment: EnrolmentSettings = EnrolmentSettings()
    metrics: MetricsSettings = MetricsSettings()
    trust: TrustSettings = TrustSettings()

    @property
    def key_file(self) -> Path:
        return self.security.key or self.aggregator.state / "federation.key"

    @property
    def update_codec(self) -> str:
        """[codec] up, or what is taken without it."""
        if self.codec.up is not None:
            return self.codec.up
        return NOISED_UPDATE_CODEC if self.privacy.is_asked_for else UPDATE_CODEC

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


Values = Mapping[str, Any]
"""Settings as they are written: sections of keys, not yet checked."""

SECTIONS: dict[str, type[BaseModel]] = {
    name: info.annotation
    for name, info in Settings.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
}

OTHER_VARIABLES = ("BROKER_FL_RABBITMQ_SERVER", "BROKER_FL_POSTGRESQL_BIN", "BROKER_FL_FAILPOINTS")
"""Variables of the prefix that are not settings."""


def load_settings(*files: Path, flags: Values | None = None, environment: Mapping[str, str] | None = None) -> Settings:
    """Later files win over earlier ones, the environment over files, flags (nested by section; None means not given) over all.

    Raises ConfigurationError that names the file or variable, the key, and for an unknown one the nearest right one.
    """
    merged: dict[str, Any] = {}
    for file in files:
        values = _read_toml(file)
        _check_alone(values, origin=str(file))
        merged = _overlay(merged, values)
    from_environment = _read_environment(os.environ if environment is None else environment)
    _check_alone(from_environment, origin="the environment")
    given = _without_none(flags or {})
    _check_alone(given, origin="the flags")
    try:
        return Settings(**_overlay(_overlay(merged, from_environment), given))
    except ValidationError as exc:
        raise ConfigurationError(f"the settings together: {_said(_mistakes(exc)[0])}") from exc


def _check_alone(values: Values, *, origin: str) -> None:
    """Each key for itself: what does not fit to a default may fit to what another origin says."""
    try:
        Settings(**values)
    except ValidationError as exc:
        mistakes = [mistake for mistake in _mistakes(exc) if mistake["type"] != "value_error" or len(mistake["loc"]) > 1]
        if mistakes:
            raise ConfigurationError(f"{origin}: {_said(mistakes[0])}") from exc


def _mistakes(exc: ValidationError) -> list[ErrorDetails]:
    return exc.errors(include_url=False, include_input=False)


def _said(mistake: ErrorDetails) -> str:
    path = [str(step) for step in mistake["loc"]]
    if mistake["type"] in ("byte_size", "byte_size_unit"):
        return f"{'.'.join(path)}: expected a size, as in 20kB or 1MiB"
    if mistake["type"] != "extra_forbidden":
        return f"{'.'.join(path)}: {mistake['msg'].removeprefix('Value error, ')}"
    if len(path) == 1:
        return f"unknown section [{path[0]}]: {nearest(path[0], SECTIONS)}"
    return f"unknown key {path[1]!r} in [{path[0]}]: {nearest(path[1], SECTIONS[path[0]].model_fields)}"


def _read_toml(file: Path) -> Values:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ConfigurationError(f"there is no {file}: `broker-fl init` writes a federation.toml to start from") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{file} cannot be read: {exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigurationError(f"{file} is not TOML: {exc}") from exc


def _read_environment(environment: Mapping[str, str]) -> Values:
    """BROKER_FL_SECTION__KEY; JSON where the key holds a list. Without it, the file that BROKER_FL_SECTION__KEY_FILE names."""
    values: dict[str, dict[str, Any]] = {}
    in_files: dict[str, dict[str, Any]] = {}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in OTHER_VARIABLES:
            continue
        section, _, key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
        if section not in SECTIONS or not key:
            known = [f"{ENVIRONMENT_PREFIX}{name.upper()}__KEY" for name in SECTIONS]
            raise ConfigurationError(f"unknown variable {variable}: {nearest(variable, known)}")
        named = key.removesuffix("_file")
        if named != key and named in SECTIONS[section].model_fields:
            in_files.setdefault(section, {})[named] = list_or_text(_read_secret(Path(text), variable))
        else:
            values.setdefault(section, {})[key] = list_or_text(text)
    return _overlay(in_files, values)


def _read_secret(file: Path, variable: str) -> str:
    """As containers are given them: a file with one value, and perhaps a line's end."""
    try:
        return file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{variable}: {file} cannot be read: {exc}") from exc


def list_or_text(text: str) -> object:
    """JSON where it is a list or an object; what is wrong with it otherwise is said by whoever checks the key."""
    if not text.startswith(("[", "{")):
        return text
    try:
        parsed: object = json.loads(text)
    except json.JSONDecodeError:
        return text
    return parsed


def _overlay(below: Values, above: Values) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _overlay(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _without_none(values: Values) -> Values:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value for key, value in values.items() if value is not None
    }
