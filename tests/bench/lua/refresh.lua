-- POST /oauth2/token with a refresh token (RFC 6749 §6), each spent once: the successor goes to the end of the
-- thread's queue. BENCH_TOKENS holds more than two refresh tokens a connection to begin with, one a line.
local common = dofile(os.getenv("BENCH_LUA") .. "/common.lua")
local head = common.head("POST", "/oauth2/token", "application/x-www-form-urlencoded")
local thread_count = tonumber(common.setting("THREADS"))
local queue, first, last = {}, 1, 0

counts = {}

local function put(token)
  last = last + 1
  queue[last] = token
end

local seed_random = init
function init(args)
  seed_random(args)
  local line = 0
  for token in io.lines(common.setting("TOKENS")) do
    line = line + 1
    if line % thread_count == thread_number - 1 then put(token) end
  end
end

function request()
  local token = queue[first]
  if token == nil then error("no refresh token is left in the queue") end
  queue[first] = nil
  first = first + 1
  local body = "grant_type=refresh_token&refresh_token=" .. token
  return head .. #body .. "\r\n\r\n" .. body
end

function response(status, headers, body)
  local successor = body:match('"refresh_token":"([^"]+)"')
  if successor then put(successor) end
  local label = status .. (successor and " refreshed" or " not refreshed")
  counts[label] = (counts[label] or 0) + 1
end
