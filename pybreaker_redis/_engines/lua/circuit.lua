-- circuit: how every script begins (read, repair, adopt) and ends (save, answer).  Prepended to each of them.
--
-- KEYS[1]  state            string  closed | open | half-open                   stock pybreaker writes it too
-- KEYS[2]  fail_counter     string  decimal                                     stock pybreaker writes it too
-- KEYS[3]  success_counter  string  decimal                                     stock pybreaker writes it too
-- KEYS[4]  opened_at        string  whole seconds since the epoch               stock pybreaker writes it too
-- KEYS[5]  circuit          hash    generation, state, opened_at_ms, probe_token, probe_until_ms, noisy_until_ms,
--                                   probe_lease_ms as of our last move
-- ARGV[1]  create           state of a circuit that nobody knows
-- ARGV[2]  known_generation of the circuit as the caller saw it last; -1: never
-- ARGV[3]  known_state
-- ARGV[4]  known_opened_at  ms since the epoch; -1: never
-- ARGV[5]  known_token      of the probe; empty: none
-- ARGV[6]  known_until      ms since the epoch
-- ARGV[7]  known_lease      its length, ms; 0: unknown
-- ARGV[8]  channel          where to tell the others; empty: nowhere
-- ARGV[9]  ttl              ms for which an untouched circuit is kept at least; 0: for ever, and no TTL is looked at
-- ARGV[10+] belong to the intent
-- RETURNS  {accepted 0|1, now ms, state, fail_counter, success_counter, opened_at ms or -1, generation, probe_token,
--          probe_until ms, noisy_until ms, probe_lease ms, event, why the others could not be told or empty}
-- TIME     the server's; clocks of callers are never compared
-- WRITES   only values that differ, so a refused intent on a sound record writes nothing; who writes the hash publishes;
--          who writes anything sees to the TTLs of all five
--
-- The reasons for these rules stand in _model/codec.py and _model/codec.py, the rules themselves in both: keep them alike.

local LEASE_MAX_MS = 24 * 3600 * 1000
local COUNT_LIMIT = 10 ^ 12
local NOISE_MAX_MS = 60 * 1000
local TTL_RENEWAL_MARGIN_MS = 1000
local BY_HAND = -1
local FIELDS = {'generation', 'state', 'opened_at_ms', 'probe_token', 'probe_until_ms', 'noisy_until_ms',
                'probe_lease_ms'}
local STATES = {['closed'] = true, ['open'] = true, ['half-open'] = true}

local circuit, now
local ttl = tonumber(ARGV[9])
local found = {}
local unheard = ''

-- A plain decimal of at most 15 digits: what a Lua number holds exactly.
local function whole(raw)
  if raw and #raw <= 15 and (raw == '0' or string.find(raw, '^[1-9]%d*$')) then
    return tonumber(raw)
  end
  return nil
end

-- A number that can still be counted on from.
local function count(raw)
  local number = whole(raw)
  return number and number < COUNT_LIMIT and number or nil
end

-- The length of a lease, ms; 0 if none is that long.
local function lease(raw)
  local number = whole(raw) or 0
  return number <= LEASE_MAX_MS and number or 0
end

-- The next count or generation, so many times; the last is its own successor, so that it can be read again.
local function after(number, times)
  return math.min(number + (times or 1), COUNT_LIMIT - 1)
end

local function decimal(number)
  -- Most numbers are zero most of the time, and formatting costs more than comparing.
  return number == 0 and '0' or string.format('%.0f', number)
end

local function seconds(at_ms)
  return at_ms and math.floor(at_ms / 1000)
end

local function read()
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

  found.plain = redis.call('MGET', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
  -- MGET reports a value of another type as missing.  The others are written anyway when they are; this one is not.
  if not found.plain[4] and redis.call('EXISTS', KEYS[4]) == 1 then found.plain[4] = '?' end
  local raw = redis.pcall('HMGET', KEYS[5], (unpack or table.unpack)(FIELDS))
  local is_hash = not raw.err
  -- Who may not read it must not take it for damage.
  if raw.err and not string.find(raw.err, 'WRONGTYPE', 1, true) then redis.call('HMGET', KEYS[5], (unpack or table.unpack)(FIELDS)) end
  found.fields = is_hash and raw or {false, false, false, false, false, false, false}
  local marked = false
  for i = 1, #FIELDS do
    marked = marked or found.fields[i] ~= false
  end

  found.anything = marked or not is_hash
  for i = 1, 4 do
    found.anything = found.anything or found.plain[i] ~= false
  end
  found.state = STATES[found.plain[1]] and found.plain[1] or nil
  found.fail_counter = count(found.plain[2])
  found.success_counter = count(found.plain[3])
  found.opened_at = whole(found.plain[4])

  local generation = count(found.fields[1])
  local readable = generation and STATES[found.fields[2]]
  found.unreadable_mark = not is_hash or (marked and not readable)
  if marked and readable then
    local token = found.fields[4]
    if not token or #token > 64 or not string.find(token, '^[0-9a-f]+$') then
      token = ''
    end
    found.mark = {
      generation = generation,
      state = found.fields[2],
      opened_at_ms = whole(found.fields[3]),
      probe_token = token,
      probe_until_ms = whole(found.fields[5]) or 0,
      noisy_until_ms = whole(found.fields[6]) or 0,
      probe_lease_ms = lease(found.fields[7]),
    }
  end
end

local function repairs(wrong_time)
  local damaged = {}
  if not found.state then damaged[#damaged + 1] = 'state' end
  if not found.fail_counter then damaged[#damaged + 1] = 'fail_counter' end
  if not found.success_counter then damaged[#damaged + 1] = 'success_counter' end
  if wrong_time or (not found.opened_at and (found.plain[4] or circuit.opened_at_ms)) then
    damaged[#damaged + 1] = 'opened_at'
  end
  if found.unreadable_mark then damaged[#damaged + 1] = 'circuit' end
  return #damaged > 0 and 'repaired ' .. table.concat(damaged, ' ') or ''
end

local function free_probe(of)
  of.probe_token, of.probe_until_ms, of.probe_lease_ms = '', 0, 0
end

-- The caller has the probe for so long from now on.
local function hold_probe(token, lease_ms)
  circuit.probe_token, circuit.probe_until_ms, circuit.probe_lease_ms = token, now + lease_ms, lease_ms
end

-- The circuit goes to another state: a new generation in which nobody holds the probe.
local function move(state)
  circuit.state = state
  circuit.generation = after(circuit.generation)
  free_probe(circuit)
end

local function believe()
  local known_generation = tonumber(ARGV[2])
  if not found.anything and known_generation < 0 then
    circuit = {state = 'closed', fail_counter = 0, success_counter = 0, generation = 0,
               probe_token = '', probe_until_ms = 0, noisy_until_ms = 0, probe_lease_ms = 0}
    if ARGV[1] ~= 'closed' then move(ARGV[1]) end
    if ARGV[1] == 'open' then circuit.opened_at_ms = now end
    return 'created'
  end

  local mark = found.mark or {generation = 0, state = 'closed', probe_token = '', probe_until_ms = 0,
                               noisy_until_ms = 0, probe_lease_ms = 0}
  local lost = known_generation > mark.generation
  if lost and found.mark and found.state == mark.state and mark.state ~= 'closed' and ARGV[3] == 'closed' then
    -- Opened by another process on an emptied server, or a lost recovery: that goes on, and its probe is free.
    mark.generation, lost = after(known_generation), false
    free_probe(mark)
  elseif lost then
    mark = {generation = known_generation, state = ARGV[3], opened_at_ms = whole(ARGV[4]), probe_token = ARGV[5],
            probe_until_ms = tonumber(ARGV[6]), noisy_until_ms = 0, probe_lease_ms = tonumber(ARGV[7])}
  elseif known_generation == mark.generation and mark.state == ARGV[3] and ARGV[3] == 'half-open' and ARGV[5] == '' then
    -- The probe was given back, and the server has lost that.
    free_probe(mark)
  end
  local state, opened_at, event = found.state, found.opened_at, ''
  local outdated = lost and found.mark and found.mark.state == state
  if outdated or (lost and mark.state ~= 'closed' and (not state or state == 'closed')) then
    state, opened_at, event = mark.state, nil, 'restored'
  elseif not state then
    state = (found.mark or mark.state ~= 'closed') and mark.state or ARGV[1]
    event = found.anything and '' or 'restored'
  end

  -- While the circuit is open the time only moves forward: a later one is somebody's new trip, an earlier one damage.
  local marked_at = seconds(mark.opened_at_ms)
  local backward = state == 'open' and mark.state == 'open' and opened_at and opened_at < (marked_at or 0)
  if backward then opened_at = nil end
  local ours = state == mark.state and not (state == 'open' and opened_at and opened_at ~= marked_at)
  local opened_at_ms
  if opened_at and opened_at == marked_at then
    -- Opened by somebody without saying when, as with redis-cli or by a host whose clock is behind: as of now.
    opened_at_ms = (state == 'open' and mark.state ~= 'open') and now or mark.opened_at_ms
  elseif opened_at then
    opened_at_ms = opened_at * 1000
  elseif ours or state ~= 'open' then
    opened_at_ms = mark.opened_at_ms
  end
  if state == 'open' and not opened_at_ms then opened_at_ms = now end
  local future = opened_at_ms and opened_at_ms > now
  if future then opened_at_ms = now end

  local probing = ours and state == 'half-open' and mark.probe_token ~= ''
  circuit = {
    state = state,
    fail_counter = found.fail_counter or 0,
    success_counter = found.success_counter or 0,
    opened_at_ms = opened_at_ms,
    generation = ours and mark.generation or after(mark.generation),
    probe_token = probing and mark.probe_token or '',
    probe_until_ms = probing and mark.probe_until_ms or 0,
    noisy_until_ms = mark.noisy_until_ms <= now + NOISE_MAX_MS and mark.noisy_until_ms or 0,
    probe_lease_ms = probing and mark.probe_lease_ms or 0,
  }
  -- More than its length is left of a lease only if the clock was set back.
  local length = circuit.probe_lease_ms
  if circuit.probe_until_ms > now + (length > 0 and length or LEASE_MAX_MS) then
    circuit.probe_until_ms = length > 0 and now + length or 0
  end
  return event ~= '' and event or repairs(future or backward)
end

-- All five end together: what is left of a circuit without the rest would be taken for damage.
local function keep(moved, counted, looks)
  if ttl == 0 or not (moved or counted or looks) then return end
  local lifetime = circuit.state == 'closed' and ttl or math.max(ttl, LEASE_MAX_MS)
  local left = redis.call('PTTL', KEYS[1])
  -- Everybody who tracks a key is told of its new TTL, so counts renew those of the others once a second only.
  if moved or (counted and left < lifetime) or (looks and left == -1) then
    local at = decimal(now + lifetime + TTL_RENEWAL_MARGIN_MS)
    for i = 1, 5 do redis.call('PEXPIREAT', KEYS[i], at) end
  end
end

local function save(looks)
  local opened_at = circuit.opened_at_ms and decimal(seconds(circuit.opened_at_ms)) or false
  local plain = {circuit.state, decimal(circuit.fail_counter), decimal(circuit.success_counter), opened_at}
  local moved, counted = found.unreadable_mark, false
  for i = 1, 4 do
    if plain[i] ~= found.plain[i] then
      local counts = (i == 2 or i == 3) and found.plain[i]
      moved, counted = moved or not counts, counted or counts
      if not plain[i] then
        redis.call('DEL', KEYS[i])
      elseif ttl > 0 and counts then
        redis.call('SET', KEYS[i], plain[i], 'KEEPTTL')
      else
        redis.call('SET', KEYS[i], plain[i])
      end
    end
  end

  if found.unreadable_mark then redis.call('DEL', KEYS[5]) end
  local needed = circuit.generation > 0 or circuit.noisy_until_ms > 0 or (circuit.opened_at_ms or 0) % 1000 > 0
  if found.mark or needed then
    local fields = {decimal(circuit.generation), circuit.state,
                    circuit.opened_at_ms and decimal(circuit.opened_at_ms) or '',
                    circuit.probe_token, decimal(circuit.probe_until_ms), decimal(circuit.noisy_until_ms),
                    decimal(circuit.probe_lease_ms)}
    local changed = false
    for i = 1, #FIELDS do
      changed = changed or fields[i] ~= found.fields[i]
    end
    if changed then
      moved = true
      local written = {}
      for i = 1, #FIELDS do
        written[2 * i - 1], written[2 * i] = FIELDS[i], fields[i]
      end
      redis.call('HSET', KEYS[5], (unpack or table.unpack)(written))
      -- A channel that is forbidden, or a server without channels, must not undo the transition.
      if ARGV[8] ~= '' then
        local told = redis.pcall('PUBLISH', ARGV[8], decimal(now) .. ' ' .. table.concat(fields, ' '))
        unheard = type(told) == 'table' and told.err or ''
      end
    end
  end
  keep(moved, counted, looks)
end

-- Whether a call that was admitted in this generation, holding this token, may still speak for the circuit.
local function admits(generation, token)
  if generation == BY_HAND then return true end
  if circuit.generation ~= generation or circuit.state == 'open' then return false end
  return circuit.state == 'closed' or circuit.probe_token == token
end

-- Half-open, and unclaimed or the lease has run out.
local function probe_is_free()
  return circuit.state == 'half-open' and (circuit.probe_token == '' or circuit.probe_until_ms <= now)
end

-- Read, let the intent decide, save, answer.  Who only looks wants no more of the keys than that they are there.
local function run(intent, looks)
  read()
  local event = believe()
  local accepted = intent()
  save(looks)
  return {accepted and 1 or 0, now, circuit.state, circuit.fail_counter, circuit.success_counter,
          circuit.opened_at_ms or -1, circuit.generation, circuit.probe_token, circuit.probe_until_ms,
          circuit.noisy_until_ms, circuit.probe_lease_ms, event, unheard}
end
