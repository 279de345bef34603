-- POST /v1/tokens/validate, a random token each.
local common = dofile(os.getenv("BENCH_LUA") .. "/common.lua")
local token = common.random_token()
local head = common.head("POST", "/v1/tokens/validate", "application/json")

common.look_at_answers(function(body)
  return body:find('"valid":true', 1, true) and "valid" or "not valid"
end)

function request()
  local body = '{"token":"' .. token() .. '"}'
  return head .. #body .. "\r\n\r\n" .. body
end
