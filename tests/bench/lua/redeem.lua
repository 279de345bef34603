-- POST /oauth2/token with an authorization code (RFC 6749 §4.1.3), each spent once. BENCH_TOKENS holds the codes, one a
-- line, and more than can be spent in the time; BENCH_PARAMETERS what is sent beside each.
local common = dofile(os.getenv("BENCH_LUA") .. "/common.lua")
local head = common.head("POST", "/oauth2/token", "application/x-www-form-urlencoded")
local rest = "grant_type=authorization_code&" .. common.setting("PARAMETERS") .. "&code="
local thread_count = tonumber(common.setting("THREADS"))
local codes, next_code = {}, 0

counts = {}

local seed_random = init
function init(args)
  seed_random(args)
  local line = 0
  for code in io.lines(common.setting("TOKENS")) do
    line = line + 1
    if line % thread_count == thread_number - 1 then table.insert(codes, code) end
  end
end

function request()
  next_code = next_code + 1
  local body = rest .. (codes[next_code] or error("no code is left"))
  return head .. #body .. "\r\n\r\n" .. body
end

function response(status, headers, body)
  local label = status .. (body:find('"access_token":"', 1, true) and " redeemed" or " not redeemed")
  counts[label] = (counts[label] or 0) + 1
end
