"""Webhooks: revocations sent to whoever registered a URL, signed as Standard Webhooks has it.

- `addresses`: which URLs and addresses may be called at all.
- `sender`: one request, whatever the receiver does.
- `signatures`: secrets and what they sign.
- `store`: URLs and secrets, sealed.
- `attempts`: the log of what was tried.
- `consumers`: how far each webhook is, which JetStream keeps.
- `commands`: register, change, remove.
- `owners`: whether those who registered them were disabled since.
- `delivery`: the process that sends.
"""
