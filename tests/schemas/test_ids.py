import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from schemas.ids import (
    Digest,
    FederationId,
    LedgerId,
    PartyId,
    PublicKey,
    SchemaVersion,
    Signature,
    UpdateId,
    Version,
    is_name,
    is_public_key,
)


@pytest.mark.parametrize("name", ["a", "0", "hospital-1", "a_b-c", "x" * 63])
def test_names_are_lower_case_letters_digits_and_dashes(name):
    assert is_name(name)
    assert TypeAdapter(PartyId).validate_python(name) == name
    assert TypeAdapter(FederationId).validate_python(name) == name


@pytest.mark.parametrize("name", ["", "-a", "_a", "A", "a.b", "a b", "a\n", "\na", "ä", "a/b", "x" * 64, "a*", "٣"])
def test_other_names_are_refused_by_schema_and_function_alike(name):
    assert not is_name(name)
    for kind in (PartyId, FederationId):
        with pytest.raises(ValidationError):
            TypeAdapter(kind).validate_python(name)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=70))
def test_the_schema_and_the_function_agree_on_every_text(text):
    try:
        TypeAdapter(PartyId).validate_python(text)
    except ValidationError:
        assert not is_name(text)
    else:
        assert is_name(text)


@pytest.mark.parametrize(("kind", "length"), [(UpdateId, 32), (LedgerId, 32), (Digest, 64), (PublicKey, 64), (Signature, 128)])
def test_ids_and_digests_are_lower_case_hexadecimal_of_one_length(kind, length):
    adapter = TypeAdapter(kind)
    assert adapter.validate_python("0123456789abcdef" * (length // 16))
    for wrong in ("a" * (length - 1), "a" * (length + 1), "A" * length, "g" * length, "a" * length + "\n", ""):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


@pytest.mark.parametrize("text", ["ab" * 32, "ab" * 31, "AB" * 32, "ab" * 32 + "\n", "", "gg" * 32])
def test_the_schema_and_the_function_agree_on_what_is_a_public_key(text):
    try:
        TypeAdapter(PublicKey).validate_python(text)
    except ValidationError:
        assert not is_public_key(text)
    else:
        assert is_public_key(text)


def test_versions_are_what_every_language_counts_exactly():
    adapter = TypeAdapter(Version)
    assert adapter.validate_python(0) == 0
    assert adapter.validate_python(2**53 - 1) == 2**53 - 1
    for wrong in (-1, 2**53):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def test_there_is_one_version_of_the_schemas():
    adapter = TypeAdapter(SchemaVersion)
    assert adapter.validate_python(1) == 1
    for wrong in (0, 2):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
