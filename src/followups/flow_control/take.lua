-- Take tokens for a batch, in one step, by this server's clock.
--
-- KEYS: a bucket each. Under KEYS[i] a hash: tokens, and at, when there were so many (µs); with ":line" behind it
-- those that wait, by their due moment and id; with ":back" the same, by when each is expected to ask again (µs).
-- ARGV[1]: for each bucket {tokens a second, tokens of a full one}.
-- ARGV[2]: for each that asks {id, since, {buckets it needs}}; ARGV[3]: the same of those that have ended.
-- ARGV[4]: after how long (µs) one that waits asks again at the latest; one that does not has been cancelled.
-- Return the moment (µs), and of each that asks how long it has to wait (µs; 0: its tokens are taken).

local EXACT = 1000000      -- one that waits longer asks again before its turn, since others in front may give up;
local EARLY = 1 / 8        -- by so much: if an eighth of the queue gives up, no token is lost
local SPARE = 500000       -- one that is so late has been cancelled, or its worker is stopped: others go first
local MOST_FORGOTTEN = 500 -- in one call, of one bucket
local MOST_WAITING = 100000

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local limits = cjson.decode(ARGV[1])
local longest = tonumber(ARGV[4])
local buckets = {}

local function whole(number)
  return type(number) == 'number' and string.format('%.0f', number) or number
end

local function forget(bucket, ids)
  bucket.waiting = bucket.waiting - redis.call('ZREM', bucket.line, unpack(ids))
  redis.call('ZREM', bucket.back, unpack(ids))
end

local function open(number)
  local bucket = buckets[number]
  if bucket then return bucket end
  local key = KEYS[number]
  bucket = {key = key, line = key .. ':line', back = key .. ':back', taken = 0, expected = 0, set_back = false}
  bucket.rate, bucket.burst = limits[number][1], limits[number][2]
  local state = redis.call('HMGET', key, 'tokens', 'at')
  local tokens, at = tonumber(state[1]), tonumber(state[2])
  if tokens then
    -- This server's clock was set back since: the bucket fills from now on, not only when that time comes again.
    bucket.set_back = at > now
    bucket.tokens = math.min(bucket.burst, tokens + math.max(0, now - at) / 1000000 * bucket.rate)
  else
    bucket.tokens = bucket.burst
  end
  bucket.waiting = redis.call('ZCARD', bucket.line)
  if bucket.waiting > 0 then
    -- No wait is as long as those of the second span: they are of before the clock was set back.
    for _, span in ipairs({{'-inf', now - SPARE}, {now + longest + SPARE, '+inf'}}) do
      local lost = redis.call('ZRANGEBYSCORE', bucket.back, whole(span[1]), whole(span[2]), 'LIMIT', 0, MOST_FORGOTTEN)
      if #lost > 0 then forget(bucket, lost) end
    end
  end
  buckets[number] = bucket
  return bucket
end

-- How many wait before this one, which from now on waits as well, if there is room.
local function before(bucket, id, since)
  if bucket.waiting == 0 then return 0 end
  if bucket.waiting >= MOST_WAITING and not redis.call('ZSCORE', bucket.line, id) then
    return redis.call('ZCOUNT', bucket.line, '-inf', since)
  end
  bucket.waiting = bucket.waiting + redis.call('ZADD', bucket.line, since, id)
  return redis.call('ZRANK', bucket.line, id)
end

local function enqueue(bucket, id, since, back)
  if bucket.waiting < MOST_WAITING or redis.call('ZSCORE', bucket.line, id) then
    bucket.waiting = bucket.waiting + redis.call('ZADD', bucket.line, since, id)
    redis.call('ZADD', bucket.back, string.format('%.0f', back), id)
    bucket.expected = math.max(bucket.expected, back)
  end
end

local function dequeue(bucket, id)
  if bucket.waiting > 0 then
    bucket.waiting = bucket.waiting - redis.call('ZREM', bucket.line, id)
    redis.call('ZREM', bucket.back, id)
  end
end

local function ask(id, since, needed)
  local refused, wait = {}, 0
  for _, number in ipairs(needed) do
    local bucket = open(number)
    local place = before(bucket, id, since)
    if place >= math.floor(bucket.tokens) then
      refused[number] = true
      wait = math.max(wait, (place + 1 - bucket.tokens) / bucket.rate * 1000000)
    end
  end
  wait = math.ceil(wait)
  if wait > EXACT then wait = math.min(longest, math.max(EXACT, math.ceil(wait * (1 - EARLY)))) end
  for _, number in ipairs(needed) do
    local bucket = buckets[number]
    if refused[number] then
      enqueue(bucket, id, since, now + wait)
    else
      dequeue(bucket, id) -- so that one that waits for its chat does not delay its workspace
      if wait == 0 then
        bucket.tokens = bucket.tokens - 1
        bucket.taken = bucket.taken + 1
      end
    end
  end
  return string.format('%.0f', wait)
end

for _, gone in ipairs(cjson.decode(ARGV[3])) do
  for _, number in ipairs(gone[3]) do dequeue(open(number), gone[1]) end
end
local answers = {string.format('%.0f', now)}
for _, request in ipairs(cjson.decode(ARGV[2])) do
  answers[#answers + 1] = ask(request[1], request[2], request[3])
end

local function outlast(key, milliseconds)
  if redis.call('PTTL', key) < milliseconds then redis.call('PEXPIRE', key, string.format('%.0f', milliseconds)) end
end

for _, bucket in pairs(buckets) do
  if bucket.taken > 0 or bucket.set_back then
    redis.call('HSET', bucket.key, 'tokens', string.format('%.17g', bucket.tokens), 'at', string.format('%.0f', now))
    -- By then it is full, which is what no bucket at all means.
    redis.call('PEXPIRE', bucket.key, string.format('%.0f', math.ceil(bucket.burst / bucket.rate * 1000) + 1000))
  end
  if bucket.expected > 0 then
    local milliseconds = math.ceil((bucket.expected - now + SPARE) / 1000) + 1000
    outlast(bucket.line, milliseconds)
    outlast(bucket.back, milliseconds)
  end
end
return answers
