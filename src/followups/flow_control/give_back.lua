-- Put tokens back that were taken and not used.
--
-- KEYS: a bucket each, as in take.lua. ARGV[1]: when they were taken (µs); ARGV[2]: for each bucket {tokens a
-- second, tokens of a full one, tokens to put back}. What has come in since then is not put back: the bucket might
-- have been full meanwhile and taken none in, and more would go than its rate allows.

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local since = math.max(0, now - tonumber(ARGV[1])) / 1000000

for number, limit in ipairs(cjson.decode(ARGV[2])) do
  local rate, burst, unused = limit[1], limit[2], limit[3]
  local key = KEYS[number]
  local tokens = tonumber(redis.call('HGET', key, 'tokens'))
  if tokens then
    local whole = math.min(burst, tokens + math.max(0, unused - rate * since))
    redis.call('HSET', key, 'tokens', string.format('%.17g', whole))
  end
end
