-- Shared by all scripts: request bytes, tokens from a file, and the numbers as one line of JSON.
-- Configuration comes from the environment (BENCH_*), so that no token stands in the process list.

local ffi = require("ffi")

ffi.cdef([[
int open(const char *path, int flags, ...);
int64_t lseek(int fd, int64_t offset, int whence);
void *mmap(void *address, size_t length, int protection, int flags, int fd, int64_t offset);
]])

local common = {}

function common.setting(name)
  local value = os.getenv("BENCH_" .. name)
  if value == nil then error("BENCH_" .. name .. " is not set") end
  return value
end

-- A file as memory: a million tokens cost a wrk thread no Lua memory and no collection.
local function map(path)
  local fd = ffi.C.open(path, 0)
  if fd < 0 then error("cannot open " .. path) end
  local length = ffi.C.lseek(fd, 0, 2)
  local address = ffi.C.mmap(nil, length, 1, 1, fd, 0)
  if ffi.cast("intptr_t", address) == -1 then error("cannot map " .. path) end
  return address, tonumber(length)
end

-- Returns a function that gives a random token of those in BENCH_TOKENS. BENCH_TOKENS.index holds where each
-- begins, and where the last ends, as 64-bit integers.
function common.random_token()
  local path = common.setting("TOKENS")
  local bytes = ffi.cast("const char *", (map(path)))
  local address, length = map(path .. ".index")
  local begins = ffi.cast("const int64_t *", address)
  local count = length / 8 - 1
  local random, string_of = math.random, ffi.string
  return function()
    local at = random(0, count - 1)
    local from = begins[at]
    return string_of(bytes + from, begins[at + 1] - from)
  end
end

-- The bytes of a request up to the value of Content-Length.
function common.head(method, path, content_type)
  return method .. " " .. path .. " HTTP/1.1\r\nHost: " .. common.setting("HOST")
    .. "\r\nAuthorization: " .. common.setting("AUTHORIZATION")
    .. "\r\nContent-Type: " .. content_type .. "\r\nContent-Length: "
end

local threads = {}

-- Called once for each thread, in wrk's own Lua state.
function setup(thread)
  table.insert(threads, thread)
  thread:set("thread_number", #threads)
end

-- Called once in each thread. The seed is fixed: every run asks for the same tokens in the same order.
function init(args)
  math.randomseed(tonumber(common.setting("SEED")) * 1000 + thread_number)
end

-- With BENCH_CHECK=1 every answer is looked at and counted as `<status> <what check says>`. That costs the load
-- generator time, so measured runs go without; wrk itself counts answers of 400 and above.
function common.look_at_answers(check)
  counts = {}
  if os.getenv("BENCH_CHECK") ~= "1" then return end
  function response(status, headers, body)
    local label = status .. " " .. check(body)
    counts[label] = (counts[label] or 0) + 1
  end
end

local function json_object(numbers)
  local parts = {}
  for name, number in pairs(numbers) do
    table.insert(parts, string.format('"%s":%.3f', (name:gsub('[%c"\\]', "?")), number))
  end
  return "{" .. table.concat(parts, ",") .. "}"
end

-- Called once at the end, in wrk's own Lua state.
function done(summary, latency, requests)
  local answers = {}
  for _, thread in ipairs(threads) do
    for label, count in pairs(thread:get("counts") or {}) do
      answers[label] = (answers[label] or 0) + count
    end
  end
  local errors = summary.errors
  io.write("\nBENCH {\"numbers\":", json_object({
    requests = summary.requests,
    duration_us = summary.duration,
    bytes = summary.bytes,
    connect_errors = errors.connect,
    read_errors = errors.read,
    write_errors = errors.write,
    timeouts = errors.timeout,
    refused = errors.status,
    p50_us = latency:percentile(50),
    p90_us = latency:percentile(90),
    p99_us = latency:percentile(99),
    max_us = latency.max,
  }), ",\"answers\":", json_object(answers), "}\n")
end

return common
