-- POST /oauth2/token with client credentials (RFC 6749 §4.4). BENCH_AUTHORIZATION is the client's own.
local common = dofile(os.getenv("BENCH_LUA") .. "/common.lua")
local body = "grant_type=client_credentials"
local bytes = common.head("POST", "/oauth2/token", "application/x-www-form-urlencoded") .. #body .. "\r\n\r\n" .. body

common.look_at_answers(function(body)
  return body:find('"access_token":"', 1, true) and "issued" or "not issued"
end)

function request()
  return bytes
end
