-- Take tokens for a batch of follow-ups, in one step, by this server's clock.
--
-- KEYS: the buckets. KEYS[i] is a hash: the number of tokens, and the time (µs) at which it was computed (at). KEYS[i]
-- with ":line" appended is the queue of waiting follow-ups, by due time and id. With ":back" appended it contains the
-- same follow-ups, by the time (µs) of each one's next expected request.
-- ARGV[1]: for each bucket {tokens per second, tokens of a full bucket}.
-- ARGV[2]: for each request {id, since, {its buckets}}; ARGV[3]: the same for follow-ups that have ended.
-- ARGV[4]: the longest time (µs) until a waiting follow-up requests tokens again; a later one has been cancelled.
-- Return the current time (µs), and for each request its wait (µs; 0 means that its tokens were taken).

-- A follow-up with a longer wait than EXACT (µs) makes its next request before its turn, since follow-ups ahead of it
-- may be cancelled. Its wait is shortened by the share EARLY: if an eighth of the queue is cancelled, no token is unused.
local EXACT = 1000000
local EARLY = 1 / 8
-- A follow-up whose request is later than this (µs) has been cancelled, or its worker has stopped. It is removed from
-- the queue.
local SPARE = 500000
-- The most follow-ups that one call removes from the queue of one bucket.
local MOST_FORGOTTEN = 500
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
    -- If this server's clock was set back, the bucket is refilled from now on, not from the recorded time.
    bucket.set_back = at > now
    bucket.tokens = math.min(bucket.burst, tokens + math.max(0, now - at) / 1000000 * bucket.rate)
  else
    bucket.tokens = bucket.burst
  end
  bucket.waiting = redis.call('ZCARD', bucket.line)
  if bucket.waiting > 0 then
    -- No wait can be as long as those in the second span, so they were recorded before the clock was set back.
    for _, span in ipairs({{'-inf', now - SPARE}, {now + longest + SPARE, '+inf'}}) do
      local lost = redis.call('ZRANGEBYSCORE', bucket.back, whole(span[1]), whole(span[2]), 'LIMIT', 0, MOST_FORGOTTEN)
      if #lost > 0 then forget(bucket, lost) end
    end
  end
  buckets[number] = bucket
  return bucket
end

-- Return the number of follow-ups ahead of this one in the queue. If the queue has room, the follow-up is added to it.
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
      dequeue(bucket, id) -- so that a follow-up that waits for its chat does not delay its workspace
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
    -- By the time the key expires, the bucket is full, and a missing key means a full bucket.
    redis.call('PEXPIRE', bucket.key, string.format('%.0f', math.ceil(bucket.burst / bucket.rate * 1000) + 1000))
  end
  if bucket.expected > 0 then
    local milliseconds = math.ceil((bucket.expected - now + SPARE) / 1000) + 1000
    outlast(bucket.line, milliseconds)
    outlast(bucket.back, milliseconds)
  end
end
return answers
