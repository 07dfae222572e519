INSERT INTO jobs (id, kind, status, hold, stage, epoch, attempt, strikes, agent, mark, provider, provider_kind, provider_path, owner, vm_id,
    vm_name, vm_folded, source, capacity, format, options, priority, data, read, durable, verified, resumed, created_by, created_at,
    updated_at, started_at, finished_at)
SELECT id, 'export', status, 'none', 'publishing', 1, 1, 0, 'gone', 0, provider, kind, '/srv/vms', 'gone', name || '.vmdk', name,
    lower(name) || CHAR10 || id, '', 1073741824, 'qcow2', '{"compress":true,"destination":"exports/"}', n % 101, 536870912, 536870912, 536870912, 536870912, 0, 'seed',
    1700000000000 + n * 1000, 1700000000000 + (n * 7919 % 100000) * 1000, 1700000000000 + n * 1000, 1700000060000 + n * 1000
FROM (SELECT n, 'job-' || ID AS id, 'VM-' || NAME AS name,
    CASE WHEN n % 5 < 3 THEN 'completed' WHEN n % 5 = 3 THEN 'failed' ELSE 'cancelled' END AS status,
    CASE n % 3 WHEN 0 THEN 'dc1' WHEN 1 THEN 'dc2' ELSE 'local' END AS provider,
    CASE WHEN n % 3 < 2 THEN 'vsphere' ELSE 'local' END AS kind FROM NUMBERS) AS made
