"""The Hub: card, verification, push."""

from hfcompress.hub.card import write_card
from hfcompress.hub.contract import ContractError, require_contract
from hfcompress.hub.push import PushError, push_folder
from hfcompress.hub.verify import RouteCheck, VerificationError, save_probe, verify_folder

__all__ = [
    "ContractError",
    "PushError",
    "RouteCheck",
    "VerificationError",
    "push_folder",
    "require_contract",
    "save_probe",
    "verify_folder",
    "write_card",
]
