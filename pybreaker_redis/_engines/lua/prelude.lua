-- prelude: Shared start and end of every operation, composed with each of them by scripts.py.
-- KEYS[1]    state            string  closed | open | half-open      pybreaker's own storage writes this key, too.
-- KEYS[2]    fail_counter     string  decimal                        pybreaker's own storage writes this key, too.
-- KEYS[3]    success_counter  string  decimal                        pybreaker's own storage writes this key, too.
-- KEYS[4]    opened_at        string  whole seconds since the epoch  pybreaker's own storage writes this key, too.
-- KEYS[5]    circuit          hash    generation, state, opened_at_ms, probe_token, probe_until_ms, noisy_until_ms,
--                                     probe_lease_ms as of this package's last transition.
-- ARGV[1]    state_if_missing    initial state of a circuit that exists neither in Redis nor in the caller's process.
-- ARGV[2]    known_generation    generation as the caller last read the circuit (-1: never).
-- ARGV[3]    known_state         state then.
-- ARGV[4]    known_opened_at_ms  time of the last opening then, milliseconds since the epoch (-1: never).
-- ARGV[5]    known_token         token of the probe then (empty: the probe was free).
-- ARGV[6]    known_until_ms      end of the probe's lease then, milliseconds since the epoch.
-- ARGV[7]    known_lease_ms      duration of the probe's lease then, milliseconds (0: unknown).
-- ARGV[8]    channel             channel for transitions (empty: do not publish).
-- ARGV[9]    ttl_ms              shortest time to live of an unused circuit, milliseconds (0: TTLs are not used).
-- ARGV[10+]  belong to the operation.
-- RETURNS    {accepted 0|1, now_ms, state, fail_counter, success_counter, opened_at_ms or -1, generation, probe_token,
--            probe_until_ms, noisy_until_ms, probe_lease_ms, repair_note, publish_error}.
-- TIME       server time.  The clocks of callers are never used.
-- WRITES     only values that differ: a refused operation on a sound record writes nothing, TTLs included.  A write to
--            the hash is published.  Any write renews the TTLs of all five keys.
-- OFFERS     BY_HAND, can_report, circuit, free_probe, is_probe_free, lease_probe, next_count, now, run, transition.
--
-- The rules are those of _model/codec.py and _model/repair.py, where the reasons are.

local LEASE_MAX_MS = 24 * 3600 * 1000
local COUNT_LIMIT = 10 ^ 12
local NOISE_MAX_MS = 60 * 1000
local TTL_RENEWAL_MARGIN_MS = 1000
local BY_HAND = -1
local FIELDS = {'generation', 'state', 'opened_at_ms', 'probe_token', 'probe_until_ms', 'noisy_until_ms',
                'probe_lease_ms'}
local STATES = {['closed'] = true, ['open'] = true, ['half-open'] = true}

local circuit, now
local ttl_ms = tonumber(ARGV[9])
local stored = {}
local publish_error = ''

-- The number of a plain decimal with at most 15 digits, which a Lua number represents exactly (nil: none).
local function whole(raw)
  if raw and #raw <= 15 and (raw == '0' or string.find(raw, '^[1-9]%d*$')) then
    return tonumber(raw)
  end
  return nil
end

-- A count or generation below the limit (nil: none).
local function count(raw)
  local number = whole(raw)
  return number and number < COUNT_LIMIT and number or nil
end

-- The duration of a lease, milliseconds (0: longer than any lease).
local function lease(raw)
  local number = whole(raw) or 0
  return number <= LEASE_MAX_MS and number or 0
end

-- A count or generation after some steps, at most the largest one that a record may hold.
local function next_count(number, times)
  return math.min(number + (times or 1), COUNT_LIMIT - 1)
end

local function decimal(number)
  -- Most numbers are zero, and a comparison costs less than formatting.
  return number == 0 and '0' or string.format('%.0f', number)
end

local function seconds(at_ms)
  return at_ms and math.floor(at_ms / 1000)
end

local function read_record()
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

  stored.plain = redis.call('MGET', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
  -- MGET returns a value of another type as missing.  A missing opened_at need not be written, so EXISTS checks it.
  if not stored.plain[4] and redis.call('EXISTS', KEYS[4]) == 1 then stored.plain[4] = '?' end
  local raw = redis.pcall('HMGET', KEYS[5], (unpack or table.unpack)(FIELDS))
  local is_hash = not raw.err
  -- Without the right to read the hash, raise the error: the hash is not damaged.
  if raw.err and not string.find(raw.err, 'WRONGTYPE', 1, true) then
    redis.call('HMGET', KEYS[5], (unpack or table.unpack)(FIELDS))
  end
  stored.fields = is_hash and raw or {false, false, false, false, false, false, false}
  local has_fields = false
  for i = 1, #FIELDS do
    has_fields = has_fields or stored.fields[i] ~= false
  end

  stored.is_present = has_fields or not is_hash
  for i = 1, 4 do
    stored.is_present = stored.is_present or stored.plain[i] ~= false
  end
  stored.state = STATES[stored.plain[1]] and stored.plain[1] or nil
  stored.fail_counter = count(stored.plain[2])
  stored.success_counter = count(stored.plain[3])
  stored.opened_at = whole(stored.plain[4])

  local generation = count(stored.fields[1])
  local is_readable = generation and STATES[stored.fields[2]]
  stored.is_hash_damaged = not is_hash or (has_fields and not is_readable)
  if has_fields and is_readable then
    local token = stored.fields[4]
    if not token or #token > 64 or not string.find(token, '^[0-9a-f]+$') then
      token = ''
    end
    stored.hash_circuit = {
      generation = generation,
      state = stored.fields[2],
      opened_at_ms = whole(stored.fields[3]),
      probe_token = token,
      probe_until_ms = whole(stored.fields[5]) or 0,
      noisy_until_ms = whole(stored.fields[6]) or 0,
      probe_lease_ms = lease(stored.fields[7]),
    }
  end
end

local function repair_note(is_time_wrong)
  local damaged = {}
  if not stored.state then damaged[#damaged + 1] = 'state' end
  if not stored.fail_counter then damaged[#damaged + 1] = 'fail_counter' end
  if not stored.success_counter then damaged[#damaged + 1] = 'success_counter' end
  if is_time_wrong or (not stored.opened_at and (stored.plain[4] or circuit.opened_at_ms)) then
    damaged[#damaged + 1] = 'opened_at'
  end
  if stored.is_hash_damaged then damaged[#damaged + 1] = 'circuit' end
  return #damaged > 0 and 'repaired ' .. table.concat(damaged, ' ') or ''
end

local function free_probe(of)
  of.probe_token, of.probe_until_ms, of.probe_lease_ms = '', 0, 0
end

-- Give the probe to a call.
local function lease_probe(token, lease_ms)
  circuit.probe_token, circuit.probe_until_ms, circuit.probe_lease_ms = token, now + lease_ms, lease_ms
end

-- Change the state: a new generation with a free probe.
local function transition(state)
  circuit.state = state
  circuit.generation = next_count(circuit.generation)
  free_probe(circuit)
end

local function resolve()
  local known_generation = tonumber(ARGV[2])
  if not stored.is_present and known_generation < 0 then
    circuit = {state = 'closed', fail_counter = 0, success_counter = 0, generation = 0,
               probe_token = '', probe_until_ms = 0, noisy_until_ms = 0, probe_lease_ms = 0}
    if ARGV[1] ~= 'closed' then transition(ARGV[1]) end
    if ARGV[1] == 'open' then circuit.opened_at_ms = now end
    return 'created'
  end

  local last = stored.hash_circuit or {generation = 0, state = 'closed', probe_token = '', probe_until_ms = 0,
                                       noisy_until_ms = 0, probe_lease_ms = 0}
  local is_lost = known_generation > last.generation
  local is_same = stored.hash_circuit and stored.state == last.state
  if is_lost and is_same and last.state ~= 'closed' and ARGV[3] == 'closed' then
    -- Another process has opened the circuit on an emptied server, or the server has lost the recovery.
    last.generation, is_lost = next_count(known_generation), false
    free_probe(last)
  elseif is_lost then
    last = {generation = known_generation, state = ARGV[3], opened_at_ms = whole(ARGV[4]), probe_token = ARGV[5],
            probe_until_ms = tonumber(ARGV[6]), noisy_until_ms = 0, probe_lease_ms = tonumber(ARGV[7])}
  elseif known_generation == last.generation and last.state == ARGV[3] and ARGV[3] == 'half-open' and ARGV[5] == '' then
    -- The server has lost the report that freed the probe.
    free_probe(last)
  end
  local state, opened_at, note = stored.state, stored.opened_at, ''
  local is_outdated = is_lost and stored.hash_circuit and stored.hash_circuit.state == state
  if is_outdated or (is_lost and last.state ~= 'closed' and (not state or state == 'closed')) then
    state, opened_at, note = last.state, nil, 'restored'
  elseif not state then
    state = (stored.hash_circuit or last.state ~= 'closed') and last.state or ARGV[1]
    note = stored.is_present and '' or 'restored'
  end

  -- While the circuit is open, the time only increases.  A later time is a new trip of another client, an earlier one
  -- is damage.
  local last_opened_at = seconds(last.opened_at_ms)
  local is_backward = state == 'open' and last.state == 'open' and opened_at and opened_at < (last_opened_at or 0)
  if is_backward then opened_at = nil end
  local is_own_transition = state == last.state and not (state == 'open' and opened_at and opened_at ~= last_opened_at)
  local opened_at_ms
  if opened_at and opened_at == last_opened_at then
    -- Another client opened the circuit without a new time, as redis-cli or a host with a slow clock: now.
    opened_at_ms = (state == 'open' and last.state ~= 'open') and now or last.opened_at_ms
  elseif opened_at then
    opened_at_ms = opened_at * 1000
  elseif is_own_transition or state ~= 'open' then
    opened_at_ms = last.opened_at_ms
  end
  if state == 'open' and not opened_at_ms then opened_at_ms = now end
  local is_future = opened_at_ms and opened_at_ms > now
  if is_future then opened_at_ms = now end

  local is_probed = is_own_transition and state == 'half-open' and last.probe_token ~= ''
  circuit = {
    state = state,
    fail_counter = stored.fail_counter or 0,
    success_counter = stored.success_counter or 0,
    opened_at_ms = opened_at_ms,
    generation = is_own_transition and last.generation or next_count(last.generation),
    probe_token = is_probed and last.probe_token or '',
    probe_until_ms = is_probed and last.probe_until_ms or 0,
    noisy_until_ms = last.noisy_until_ms <= now + NOISE_MAX_MS and last.noisy_until_ms or 0,
    probe_lease_ms = is_probed and last.probe_lease_ms or 0,
  }
  -- A lease has more time left than its duration only if the clock was set back.
  local lease_ms = circuit.probe_lease_ms
  if circuit.probe_until_ms > now + (lease_ms > 0 and lease_ms or LEASE_MAX_MS) then
    circuit.probe_until_ms = lease_ms > 0 and now + lease_ms or 0
  end
  return note ~= '' and note or repair_note(is_future or is_backward)
end

-- Renew the TTLs of all five keys together, because a record with only some of them counts as damaged.
local function renew_ttl(has_moved, has_counted, is_load)
  if ttl_ms == 0 or not (has_moved or has_counted or is_load) then return end
  local lifetime_ms = circuit.state == 'closed' and ttl_ms or math.max(ttl_ms, LEASE_MAX_MS)
  local left = redis.call('PTTL', KEYS[1])
  -- A new TTL is pushed to every process that tracks a key, so counts renew TTLs only after the margin is used up.
  if has_moved or (has_counted and left < lifetime_ms) or (is_load and left == -1) then
    local expires_at = decimal(now + lifetime_ms + TTL_RENEWAL_MARGIN_MS)
    for i = 1, 5 do redis.call('PEXPIREAT', KEYS[i], expires_at) end
  end
end

local function save(is_load)
  local opened_at = circuit.opened_at_ms and decimal(seconds(circuit.opened_at_ms)) or false
  local plain = {circuit.state, decimal(circuit.fail_counter), decimal(circuit.success_counter), opened_at}
  local has_moved, has_counted = stored.is_hash_damaged, false
  for i = 1, 4 do
    if plain[i] ~= stored.plain[i] then
      local is_counter = (i == 2 or i == 3) and stored.plain[i]
      has_moved, has_counted = has_moved or not is_counter, has_counted or is_counter
      if not plain[i] then
        redis.call('DEL', KEYS[i])
      elseif ttl_ms > 0 and is_counter then
        redis.call('SET', KEYS[i], plain[i], 'KEEPTTL')
      else
        redis.call('SET', KEYS[i], plain[i])
      end
    end
  end

  if stored.is_hash_damaged then redis.call('DEL', KEYS[5]) end
  local exceeds_plain = circuit.generation > 0 or circuit.noisy_until_ms > 0 or (circuit.opened_at_ms or 0) % 1000 > 0
  if stored.hash_circuit or exceeds_plain then
    local fields = {decimal(circuit.generation), circuit.state,
                    circuit.opened_at_ms and decimal(circuit.opened_at_ms) or '',
                    circuit.probe_token, decimal(circuit.probe_until_ms), decimal(circuit.noisy_until_ms),
                    decimal(circuit.probe_lease_ms)}
    local has_changed = false
    for i = 1, #FIELDS do
      has_changed = has_changed or fields[i] ~= stored.fields[i]
    end
    if has_changed then
      has_moved = true
      local arguments = {}
      for i = 1, #FIELDS do
        arguments[2 * i - 1], arguments[2 * i] = FIELDS[i], fields[i]
      end
      redis.call('HSET', KEYS[5], (unpack or table.unpack)(arguments))
      -- A forbidden channel, or a server without channels, must not undo the transition.
      if ARGV[8] ~= '' then
        local published = redis.pcall('PUBLISH', ARGV[8], decimal(now) .. ' ' .. table.concat(fields, ' '))
        publish_error = type(published) == 'table' and published.err or ''
      end
    end
  end
  renew_ttl(has_moved, has_counted, is_load)
end

-- Whether a call may still report to the circuit.
local function can_report(generation, token)
  if generation == BY_HAND then return true end
  if circuit.generation ~= generation or circuit.state == 'open' then return false end
  return circuit.state == 'closed' or circuit.probe_token == token
end

-- Whether a call may claim the probe: half-open, and unclaimed or with an expired lease.
local function is_probe_free()
  return circuit.state == 'half-open' and (circuit.probe_token == '' or circuit.probe_until_ms <= now)
end

-- Read the record, decide the operation, write the changes, return the reply.  A load renews only missing TTLs.
local function run(operation, is_load)
  read_record()
  local note = resolve()
  local accepted = operation()
  save(is_load)
  return {accepted and 1 or 0, now, circuit.state, circuit.fail_counter, circuit.success_counter,
          circuit.opened_at_ms or -1, circuit.generation, circuit.probe_token, circuit.probe_until_ms,
          circuit.noisy_until_ms, circuit.probe_lease_ms, note, publish_error}
end
