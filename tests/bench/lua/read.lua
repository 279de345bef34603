-- GET of what anybody may read, at BENCH_PATH_READ.
local common = dofile(os.getenv("BENCH_LUA") .. "/common.lua")
local bytes = "GET " .. common.setting("PATH_READ") .. " HTTP/1.1\r\nHost: " .. common.setting("HOST") .. "\r\n\r\n"

common.look_at_answers(function(body) return "" end)

function request()
  return bytes
end
