-- POST /v1/tokens/validate-batch, BENCH_BATCH random tokens each.
local common = dofile(os.getenv("BENCH_LUA") .. "/common.lua")
local token = common.random_token()
local head = common.head("POST", "/v1/tokens/validate-batch", "application/json")
local size = tonumber(common.setting("BATCH"))
local items = {}

common.look_at_answers(function(body)
  local _, valid = body:gsub('"valid":true', "")
  return valid == size and "all valid" or "not all valid"
end)

function request()
  for item = 1, size do items[item] = token() end
  local body = '{"requests":[{"token":"' .. table.concat(items, '"},{"token":"') .. '"}]}'
  return head .. #body .. "\r\n\r\n" .. body
end
