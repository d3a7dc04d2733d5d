"""What is said to routers by UPnP, and what is believed of their answers."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshmax.base.errors import RemoteProtocolError
from meshmax.wire.upnp import (
    CONFLICT,
    MAX_DOCUMENT_BYTES,
    MAX_SERVICES,
    TARGETS,
    Fault,
    Service,
    action,
    answer_of,
    location_of,
    search,
    services_of,
)

ROUTER = "192.168.7.1"
LOCATION = f"http://{ROUTER}:36783/rootDesc.xml"
TYPE = "urn:schemas-upnp-org:service:WANIPConnection:1"
SERVICE = f"<service><serviceType>{TYPE}</serviceType><controlURL>/ctl/IPConn</controlURL></service>"
DESCRIPTION = f"""<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><device><deviceList><device><serviceList>
<service><serviceType>urn:schemas-upnp-org:service:Layer3Forwarding:1</serviceType><controlURL>/L3F</controlURL></service>
{SERVICE}</serviceList></device></deviceList></device></root>"""


def answered(location: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nST: {TARGETS[0]}\r\nLocation: {location}\r\nEXT:\r\n\r\n".encode()


def test_a_search_is_as_the_standard_has_it() -> None:
    lines = search(TARGETS[0]).decode().split("\r\n")
    assert lines[0] == "M-SEARCH * HTTP/1.1"
    assert {"HOST: 239.255.255.250:1900", 'MAN: "ssdp:discover"', "MX: 1", f"ST: {TARGETS[0]}"} <= set(lines)


def test_a_description_is_where_the_one_that_answered_says_it_has_it() -> None:
    assert location_of(answered(LOCATION), ROUTER) == LOCATION


@pytest.mark.parametrize(
    "answer",
    [
        answered("http://192.168.7.9:80/x"),  # somebody else
        answered("http://router.example/x"),
        answered("http://127.0.0.1:11434/api/v1/drain"),
        answered("https://192.168.7.1/x"),
        answered("file:///etc/passwd"),
        answered("http://192.168.7.1:99999/x"),
        answered("http://192.168.7.1@10.0.0.1/x"),
        answered(f"http://{ROUTER}/" + "x" * 600),
        answered(LOCATION, "404 Not Found"),
        b"NOTIFY * HTTP/1.1\r\n\r\n",
        b"",
        answered(LOCATION) + b"x" * 3000,
    ],
)
def test_an_answer_that_leads_elsewhere_or_is_none_is_refused(answer: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        location_of(answer, ROUTER)


def test_the_service_that_maps_ports_is_found_wherever_it_is_nested() -> None:
    assert services_of(DESCRIPTION.encode(), LOCATION) == (Service(TYPE, f"http://{ROUTER}:36783/ctl/IPConn"),)


def test_a_base_in_the_description_counts_only_at_the_same_host() -> None:
    there = DESCRIPTION.replace("<device>", f"<URLBase>http://{ROUTER}:99/</URLBase><device>", 1)
    assert services_of(there.encode(), LOCATION)[0].url == f"http://{ROUTER}:99/ctl/IPConn"
    for elsewhere in ("http://10.0.0.1:99/", "http://127.0.0.1/"):
        with pytest.raises(RemoteProtocolError, match="other hosts"):
            services_of(there.replace(f"http://{ROUTER}:99/", elsewhere).encode(), LOCATION)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<root>",
        b"<!DOCTYPE r [<!ENTITY a 'ha'>]><root>&a;</root>",
        "<!DOCTYPE r><root/>".encode("utf-16"),
        "<!DOCTYPE r><root/>".encode("utf-16-be"),
        b"<root>" + b" " * MAX_DOCUMENT_BYTES + b"</root>",
        b'<?xml version="1.0" encoding="nonsense"?><root/>',
    ],
)
def test_what_is_no_plain_short_document_is_refused(document: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        services_of(document, LOCATION)
    with pytest.raises(RemoteProtocolError):
        answer_of(document, "AddPortMapping")


def test_only_so_many_services_are_looked_at() -> None:
    assert len(services_of(DESCRIPTION.replace(SERVICE, SERVICE * 100).encode(), LOCATION)) == MAX_SERVICES


def test_an_action_names_its_service_and_escapes_what_it_says() -> None:
    headers, body = action(Service(TYPE, LOCATION), "AddPortMapping", {"NewExternalPort": 11435, "NewText": "<&>"})
    assert headers["SOAPAction"] == f'"{TYPE}#AddPortMapping"'
    assert f'<u:AddPortMapping xmlns:u="{TYPE}"><NewExternalPort>11435</NewExternalPort>'.encode() in body
    assert b"<NewText>&lt;&amp;&gt;</NewText>" in body


def test_answers_and_faults_are_read() -> None:
    inner = "<u:GetXResponse xmlns:u='u'><Ip>11.22.33.1</Ip></u:GetXResponse>"
    given_ = f"<s:Envelope xmlns:s='s'><s:Body>{inner}</s:Body></s:Envelope>"
    assert answer_of(given_.encode(), "GetX") == {"Ip": "11.22.33.1"}
    with pytest.raises(RemoteProtocolError):
        answer_of(given_.encode(), "GetY")
    fault = "<a><UPnPError xmlns='c'><errorCode>718</errorCode><errorDescription>Con\tflict</errorDescription></UPnPError></a>"
    assert answer_of(fault.encode(), "GetX") == Fault(CONFLICT, "Conflict")
    assert answer_of(b"<a><UPnPError/></a>", "GetX") == Fault(0, "")


@given(st.binary(max_size=300))
def test_noise_is_read_or_refused(noise: bytes) -> None:
    for datagram in (b"HTTP/1.1 200 OK\r\nLOCATION: " + noise, noise):
        with suppress(RemoteProtocolError):
            location_of(datagram, ROUTER)
    for document in (noise, b"<r>" + noise + b"</r>"):
        with suppress(RemoteProtocolError):
            services_of(document, LOCATION)
        with suppress(RemoteProtocolError):
            answer_of(document, "GetX")


def test_a_document_that_is_nested_as_deep_as_fits_is_read_or_refused() -> None:
    depth = MAX_DOCUMENT_BYTES // 7
    with suppress(RemoteProtocolError):
        assert services_of(b"<a>" * depth + b"</a>" * depth, LOCATION) == ()
