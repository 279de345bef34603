-- GET /v1/forward-auth, a random token each, in the header as a proxy sends it.
local common = dofile(os.getenv("BENCH_LUA") .. "/common.lua")
local token = common.random_token()
local head = "GET /v1/forward-auth?audience=" .. common.setting("AUDIENCE") .. " HTTP/1.1\r\nHost: "
  .. common.setting("HOST") .. "\r\nAuthorization: Bearer "

common.look_at_answers(function(body) return "" end)

function request()
  return head .. token() .. "\r\n\r\n"
end
