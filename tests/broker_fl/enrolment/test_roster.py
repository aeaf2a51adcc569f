"""Files of many parties, as people and spreadsheets write them."""

from pathlib import Path

import pytest

from broker_fl.config import TrustSettings
from broker_fl.enrolment import PartyFacts, party_facts, read_roster
from broker_fl.errors import ConfigurationError

KEY = "0123456789abcdef" * 4


def roster(folder: Path, text: str | bytes, *, trust: TrustSettings | None = None) -> list[PartyFacts]:
    file = folder / "parties.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_roster(file, trust=trust)


def test_a_name_is_enough(tmp_path):
    assert roster(tmp_path, "name\na\nb-1\n") == [PartyFacts("a"), PartyFacts("b-1")]


def test_all_columns_in_any_order_with_quotes_and_empty_cells(tmp_path):
    text = (
        f'tier,num_samples,name,group,public_key,display_name\ntrusted,1200,a,north,{KEY},"Klinikum ""Köln"", Haus 2"\n,,b,,,\n'
    )
    assert roster(tmp_path, text) == [
        PartyFacts(
            "a",
            {
                "tier": "trusted",
                "num_samples": 1200,
                "group": "north",
                "public_key": KEY,
                "display_name": 'Klinikum "Köln", Haus 2',
            },
        ),
        PartyFacts("b"),
    ]


def test_as_a_spreadsheet_saves_it(tmp_path):
    """With a mark of the byte order, CRLF, headings for people, spaces and empty lines."""
    text = b"\xef\xbb\xbfName,Display Name, Num Samples \r\n a ,Hospital A,10\r\n\r\n,,\r\nb,,\r\n"
    assert roster(tmp_path, text) == [PartyFacts("a", {"display_name": "Hospital A", "num_samples": 10}), PartyFacts("b")]


def test_a_public_key_may_be_written_in_capitals(tmp_path):
    (facts,) = roster(tmp_path, f"name,public_key\na,{KEY.upper()}\n")
    assert facts.public_key == KEY


def test_there_is_no_limit_to_the_lines(tmp_path):
    parties = roster(tmp_path, "name\n" + "".join(f"party-{number}\n" for number in range(10_001)))
    assert len(parties) == 10_001


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name\na\nA\n", r"parties\.csv, line 3: 'A' cannot be a party"),
        ("name\na.b\n", "line 2: 'a.b' cannot be a party"),
        (f"name\n{'a' * 64}\n", "line 2: .* cannot be a party"),
        ("name\na\n\nb\na\n", "line 5: party 'a' is in line 2 already"),
        ("name\nA\nB\nC\n", "line 2: 'A'.*; and 2 more wrong lines"),
        ("name,group\na,North Sea\n", "line 2: group 'North Sea': expected lower-case"),
        ('name,num_samples\na,"1,000"\n', "line 2: num samples '1,000': expected a whole number"),
        ("name,num_samples\na,0\n", "line 2: num samples 0: expected a whole number from 1"),
        ("name,num_samples\na,1.5\n", "line 2: num samples '1.5'"),
        ("name,num_samples\na,٣\n", "line 2: num samples '٣'"),
        (f"name,num_samples\na,{'9' * 5000}\n", "line 2: num samples '9+\\.\\.\\.: expected"),
        ("name,public_key\na,abc\n", "line 2: public key 'abc': expected an Ed25519"),
        (
            'name,display_name\na,"two\nlines"\n',
            "line 3: display name 'two.*lines': expected at most 200 characters, in one line",
        ),
        (f"name,display_name\na,{'x' * 201}\n", "line 2: display name"),
        ("name,tier\na,trustd\n", "line 2: tier 'trustd': did you mean 'trusted'"),
        ("name,group\n,north\n", "line 2: there is no name"),
        ("name,group\na\n", "line 2: 1 cells for 2 columns"),
        ("name,group\na,b,c\n", "line 2: 3 cells for 2 columns"),
        ("name,grup\na,b\n", "unknown column 'grup': did you mean 'group'"),
        ("name,suspended\na,true\n", "unknown column 'suspended'"),
        ("name,name\na,b\n", "two columns are called 'name'"),
        ("group\nnorth\n", "no column is called 'name'"),
        ("a\nb\n", "unknown column 'a'"),
        ("name;group\na;b\n", "not separated by commas"),
        ("", "names no party"),
        ("name\n", "names no party"),
        ("\n\n", "names no party"),
        (b"name\n\xe4\n", "not UTF-8"),
        (b"name\na\x00b\n", "line 2"),
        ('name,display_name\na,"open\n', "line 2: no CSV"),
        ('name,display_name\na,"x"y\n', "line 2: no CSV"),
        (f'name,display_name\na,"{"x" * 200_000}"\n', "line 2: no CSV"),
    ],
)
def test_a_wrong_file_is_one_line_that_says_where(tmp_path, text: str | bytes, expected: str):
    with pytest.raises(ConfigurationError, match=expected) as caught:
        roster(tmp_path, text, trust=TrustSettings())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path):
    for file in (tmp_path / "nothing.csv", tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            read_roster(file)


def test_tiers_are_those_of_the_federation(tmp_path):
    trust = TrustSettings(tiers={"gold": 1.0})
    assert roster(tmp_path, "name,tier\na,gold\n", trust=trust)[0].given == {"tier": "gold"}
    with pytest.raises(ConfigurationError, match=r"known: gold.*\[trust\] tiers"):
        party_facts("a", {"tier": "trusted"}, trust=trust)


@pytest.mark.parametrize("name", ["", "Alice", "a.b", "-a", "a b", "ä", "a" * 64, "admin.local", "a\n"])
def test_a_name_that_cannot_be_a_party(name: str):
    with pytest.raises(ConfigurationError, match="cannot be a party"):
        party_facts(name)
