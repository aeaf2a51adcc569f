"""Making and unmaking parties on the broker, the register that says who they are, and the file that a party's worker reads."""

from broker_fl.enrolment.credentials import Certificate, Credentials, Issue, PartyFiles, Unkept, make_folder_of_files
from broker_fl.enrolment.looking import Listed, Seen, fingerprint, list_members, list_parties, see_party
from broker_fl.enrolment.office import Office, open_office
from broker_fl.enrolment.parties import (
    Outcome,
    add_parties,
    add_party,
    change_party,
    inbox_limits,
    remove_party,
    resume_party,
    rotate_party,
    suspend_party,
)
from broker_fl.enrolment.register import Register
from broker_fl.enrolment.roster import PartyFacts, names_of, party_facts, read_roster
from broker_fl.enrolment.shelf import Shelf, claim_key, management_of

__all__ = [
    "Certificate",
    "Credentials",
    "Issue",
    "Listed",
    "Office",
    "Outcome",
    "PartyFacts",
    "PartyFiles",
    "Register",
    "Seen",
    "Shelf",
    "Unkept",
    "add_parties",
    "add_party",
    "change_party",
    "claim_key",
    "fingerprint",
    "inbox_limits",
    "list_members",
    "list_parties",
    "make_folder_of_files",
    "management_of",
    "names_of",
    "open_office",
    "party_facts",
    "read_roster",
    "remove_party",
    "resume_party",
    "rotate_party",
    "see_party",
    "suspend_party",
]
