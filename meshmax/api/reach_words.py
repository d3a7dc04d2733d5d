"""Where this peer stands to its network, as JSON. Not here: what it means (base.reachability)."""

from __future__ import annotations

from typing import Any

import msgspec

from meshmax.base.reachability import Reachability


def reachability_json(where: Reachability, *, udp_blocked: bool, now_s: float) -> dict[str, Any]:
    """``now_s``: the clock that mappings expire by, monotonic seconds."""
    return {
        "state": where.state,
        "why": where.why,
        "nat": msgspec.to_builtins(where.nat),
        "udp_blocked": udp_blocked,
        "external_ips": list(where.external_ips),
        "reached_at": list(where.addresses),
        "mappings": [
            {
                "protocol": each.protocol,
                "port": each.port,
                "external": f"[{each.external_ip}]:{each.external_port}"
                if ":" in each.external_ip
                else f"{each.external_ip}:{each.external_port}",
                "by": each.by,
                "expires_in_s": round(max(0.0, each.expires_s - now_s)),
            }
            for each in where.mappings
        ],
        "mapping_why": where.mapping_why,
        "relays": list(where.relays),
    }
