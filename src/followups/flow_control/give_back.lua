-- Return unused tokens to their buckets.
--
-- KEYS: the buckets, as in take.lua. ARGV[1]: when the tokens were taken (µs); ARGV[2]: for each bucket {tokens per
-- second, tokens of a full bucket, tokens to return}. The number of returned tokens is reduced by the number of tokens
-- added since then: a bucket that was full in the meantime would otherwise exceed its rate.

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
