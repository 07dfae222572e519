{{- define "hypersdk.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "hypersdk.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: hypersdk
{{- end -}}

{{- define "hypersdk.controller.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: controller
{{- end -}}

{{- define "hypersdk.agent.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: agent
{{- end -}}

{{- define "hypersdk.serviceAccount" -}}
{{- ternary (default (include "hypersdk.fullname" .) .Values.serviceAccount.name) (default "default" .Values.serviceAccount.name) .Values.serviceAccount.create -}}
{{- end -}}

{{- define "hypersdk.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "hypersdk.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What cannot work is refused here, with what would. */}}
{{- define "hypersdk.refusals" -}}
{{- $sqlite := not .Values.database.existingSecret -}}
{{- $many := gt (int .Values.controller.replicas) 1 -}}
{{- if and $many $sqlite -}}
{{- fail "controller.replicas > 1 needs Postgres: set database.existingSecret to a Secret that holds its URL (SQLite serves one controller)" -}}
{{- end -}}
{{- if and $many (not .Values.sealing.existingSecret) -}}
{{- fail "controller.replicas > 1 share one sealing key: set sealing.existingSecret to a Secret with 64 hex digits" -}}
{{- end -}}
{{- if and $many (not .Values.persistence.existingClaim) (not (has "ReadWriteMany" .Values.persistence.accessModes)) -}}
{{- fail "controller.replicas > 1 share the data folder (the agents' CA, the certificate): set persistence.accessModes to [ReadWriteMany], or persistence.existingClaim to such a claim" -}}
{{- end -}}
{{- if and .Values.agent.enabled (not .Values.agent.tokenSecret.name) -}}
{{- fail "agent.enabled needs agent.tokenSecret.name: a Secret with a join token made by the controller" -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled (not .Values.metrics.public) (not .Values.serviceMonitor.tokenSecret.name) -}}
{{- fail "serviceMonitor.enabled needs serviceMonitor.tokenSecret.name (a Secret with an API token) or metrics.public: true" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "ingress.enabled needs ingress.host" -}}
{{- end -}}
{{- end -}}

{{- define "hypersdk.claimSpec" -}}
accessModes: {{ toJson .accessModes }}
{{- with .storageClass }}
storageClassName: {{ . | quote }}
{{- end }}
resources:
  requests:
    storage: {{ .size | quote }}
{{- end -}}

{{- define "hypersdk.controller.pod" -}}
metadata:
  labels:
    {{- include "hypersdk.controller.selector" . | nindent 4 }}
    {{- include "hypersdk.labels" . | nindent 4 }}
  {{- with .Values.controller.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "hypersdk.serviceAccount" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.controller.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  # It drains for up to 25 s.
  terminationGracePeriodSeconds: 30
  securityContext: {{- include "hypersdk.podSecurity" . | nindent 4 }}
  containers:
    - name: controller
      image: "{{ .Values.controller.image.repository }}:{{ default .Chart.AppVersion .Values.controller.image.tag }}"
      imagePullPolicy: {{ .Values.controller.image.pullPolicy }}
      securityContext: {{- include "hypersdk.containerSecurity" . | nindent 8 }}
      ports:
        - { name: rest, containerPort: 5080, protocol: TCP }
        - { name: grpc, containerPort: 5443, protocol: TCP }
      env:
        - { name: HYPERSDK_LISTEN, value: "0.0.0.0:5080" }
        - { name: HYPERSDK_GRPC_LISTEN, value: "0.0.0.0:5443" }
        - name: HYPERSDK_GRPC_NAMES
          {{- $service := include "hypersdk.fullname" . }}
          {{- $own := list $service (printf "%s.%s" $service .Release.Namespace) (printf "%s.%s.svc" $service .Release.Namespace) (printf "%s.%s.svc.cluster.local" $service .Release.Namespace) "localhost" }}
          value: {{ concat $own .Values.controller.grpcNames | join "," | quote }}
        # A folder below the volume's root: its own, closed to all others, and beside what a file system keeps there.
        - { name: HYPERSDK_DATA_DIR, value: /var/lib/hypersdk/controller }
        - { name: HYPERSDK_LOG, value: {{ .Values.controller.log | quote }} }
        - { name: HYPERSDK_LOG_JSON, value: "true" }
        - { name: HYPERSDK_METRICS_PUBLIC, value: {{ .Values.metrics.public | quote }} }
        {{- with .Values.controller.trustedProxies }}
        - { name: HYPERSDK_TRUSTED_PROXIES, value: {{ join "," . | quote }} }
        {{- end }}
        {{- if .Values.database.existingSecret }}
        - { name: HYPERSDK_DATABASE_URL_FILE, value: /run/secrets/hypersdk/database_url }
        {{- end }}
        {{- if .Values.admin.existingSecret }}
        - { name: HYPERSDK_ADMIN_PASSWORD_FILE, value: /run/secrets/hypersdk/admin_password }
        {{- end }}
        {{- if .Values.sealing.existingSecret }}
        - { name: HYPERSDK_SEALING_KEY_FILE, value: /run/secrets/hypersdk/sealing_key }
        {{- end }}
        {{- if .Values.tls.existingSecret }}
        - { name: HYPERSDK_TLS_CERT, value: /run/secrets/hypersdk/tls.crt }
        - { name: HYPERSDK_TLS_KEY, value: /run/secrets/hypersdk/tls.key }
        {{- end }}
        {{- with .Values.controller.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      # The first start migrates the database: two minutes before it counts as hung.
      startupProbe:
        httpGet: { path: /livez, port: rest, scheme: HTTPS }
        periodSeconds: 2
        timeoutSeconds: 5
        failureThreshold: 60
      # The process alone. A database that is away must not restart the controllers: it would only add to the trouble.
      livenessProbe:
        httpGet: { path: /livez, port: rest, scheme: HTTPS }
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      # The database too, and false while draining.
      readinessProbe:
        httpGet: { path: /readyz, port: rest, scheme: HTTPS }
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      resources: {{- toYaml .Values.controller.resources | nindent 8 }}
      volumeMounts:
        - { name: data, mountPath: /var/lib/hypersdk }
        - { name: tmp, mountPath: /tmp }
        {{- if or .Values.database.existingSecret .Values.admin.existingSecret .Values.sealing.existingSecret .Values.tls.existingSecret }}
        - { name: secrets, mountPath: /run/secrets/hypersdk, readOnly: true }
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: { sizeLimit: 256Mi }
    {{- if or .Values.database.existingSecret .Values.admin.existingSecret .Values.sealing.existingSecret .Values.tls.existingSecret }}
    - name: secrets
      projected:
        defaultMode: 0440
        sources:
          {{- with .Values.database }}
          {{- if .existingSecret }}
          - secret: { name: {{ .existingSecret | quote }}, items: [{ key: {{ .key | quote }}, path: database_url }] }
          {{- end }}
          {{- end }}
          {{- with .Values.admin }}
          {{- if .existingSecret }}
          - secret: { name: {{ .existingSecret | quote }}, items: [{ key: {{ .key | quote }}, path: admin_password }] }
          {{- end }}
          {{- end }}
          {{- with .Values.sealing }}
          {{- if .existingSecret }}
          - secret: { name: {{ .existingSecret | quote }}, items: [{ key: {{ .key | quote }}, path: sealing_key }] }
          {{- end }}
          {{- end }}
          {{- with .Values.tls.existingSecret }}
          - secret: { name: {{ . | quote }}, items: [{ key: tls.crt, path: tls.crt }, { key: tls.key, path: tls.key }] }
          {{- end }}
    {{- end }}
    {{- if or .Values.database.existingSecret .Values.persistence.existingClaim }}
    - name: data
      persistentVolumeClaim:
        claimName: {{ default (printf "%s-data" (include "hypersdk.fullname" .)) .Values.persistence.existingClaim | quote }}
    {{- end }}
  {{- with .Values.controller.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.controller.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if .Values.controller.affinity }}
  affinity: {{- toYaml .Values.controller.affinity | nindent 4 }}
  {{- else if gt (int .Values.controller.replicas) 1 }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "hypersdk.controller.selector" . | nindent 10 }}
  {{- end }}
{{- end -}}
