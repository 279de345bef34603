-- POST /oauth2/introspect (RFC 7662), a random token each. Token strings need no form encoding.
local common = dofile(os.getenv("BENCH_LUA") .. "/common.lua")
local token = common.random_token()
local head = common.head("POST", "/oauth2/introspect", "application/x-www-form-urlencoded")

common.look_at_answers(function(body)
  return body:find('"active":true', 1, true) and "active" or "not active"
end)

function request()
  local body = "token=" .. token()
  return head .. #body .. "\r\n\r\n" .. body
end
