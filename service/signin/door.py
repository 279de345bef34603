"""Temporary."""

from __future__ import annotations

from service.incoming import Incoming, parse_form
from service.outgoing import Response
from service.pages.render import page
from service.pages.values import SignIn
from service.rules.authorization import Parameters, after_sign_in
from service.runtime import Runtime
from service.signin.browser import check_csrf, csrf_token, open_request, read_page_form
from service.signin.passwords import WrongPassword, check
from service.signin.sessions import begin, session_of


async def sign_in(runtime: Runtime, incoming: Incoming) -> Response:
    form = await read_page_form(runtime, incoming)
    browser = check_csrf(runtime, incoming, form, "sign-in")
    query = open_request(runtime, browser, form.need("request"))
    username = form.get("username") or ""
    try:
        proof = await check(runtime, username, form.get("password") or "", incoming.client_ip(runtime.settings))
    except WrongPassword as error:
        hidden = [("request", form.need("request")), ("csrf", csrf_token(runtime, browser, "sign-in"))]
        values = SignIn(app=None, username=username, problem=error.detail, hidden=hidden)
        return page("sign_in", values, status=400)
    _, cookie = await begin(runtime, incoming, proof, replacing=await session_of(runtime, incoming))
    return Response(
        303, b"", (("location", "/oauth2/authorize?" + after_sign_in(Parameters(parse_form(query.encode())))), cookie)
    )
