"""The Hub: card, verification, push."""

from hfcompress.hub.card import write_card
from hfcompress.hub.push import PushError, push_folder
from hfcompress.hub.verify import RouteCheck, VerificationError, save_probe, verify_folder

__all__ = [
    "PushError",
    "RouteCheck",
    "VerificationError",
    "push_folder",
    "save_probe",
    "verify_folder",
    "write_card",
]
